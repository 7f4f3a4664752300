"""A run stopped anywhere and by anything ends with the weights of an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastssl
from fastssl.cli import run
from fastssl.runtime.signals import Interrupted, stop_signals

TRIALS = int(os.environ.get("FASTSSL_TRIALS", "3"))  # of SIGKILLs; 20 take 20 minutes
ENVIRONMENT = {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
SMALL = ("--epochs", "12", "--backbone", "fastnet-8", "--label-draws", "1")


def test_signals_stop_at_once_or_are_deferred() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert stop.received == signal.SIGTERM
            with pytest.raises(Interrupted, match="stopped by SIGTERM") as interrupted:
                stop.raise_if(stop.received or 0)
            assert interrupted.value.exit_code == 143
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before


BUSY = """
import hashlib, sys
from fastssl.runtime.signals import stop_signals
with stop_signals() as stop:
    with stop.deferred():
        print("busy", flush=True)
        {busy}
"""
NATIVE = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without Python'


@pytest.mark.parametrize("busy", ["while True: pass", NATIVE])
def test_a_second_ctrl_c_stops_within_a_second(busy: str) -> None:
    """Also where the main thread is in native code, in which Python calls no signal handler."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(busy=busy)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    first = process.stderr.readline()
    assert first.startswith("fastssl: SIGINT received: saving after the current step; press Ctrl-C")
    process.send_signal(signal.SIGINT)  # the same press, passed on by a launcher
    time.sleep(0.3)
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - begin < 1
    assert process.returncode == 130 if busy == NATIVE else "Interrupted: stopped by SIGINT" in err


def test_only_ctrl_c_counts_as_a_second_signal() -> None:
    """Schedulers and launchers repeat SIGTERM, or send it after Ctrl-C, while the run saves."""
    with stop_signals() as stop, stop.deferred():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
            time.sleep(0.25)
        assert stop.received == signal.SIGUSR1


def test_outside_the_main_thread_there_are_no_signals() -> None:
    logged: list[str] = []

    def worker() -> None:
        with stop_signals(logged.append) as stop, stop.deferred():
            assert stop.received is None
        logged.append("done")

    thread = threading.Thread(target=worker)
    thread.start()
    thread.join()
    assert logged == [
        "training outside the main thread: no signal saves or stops this run",
        "done",
    ]


def command(run: Path, *arguments: str) -> list[str]:
    arguments = arguments or ("digits-diet", *SMALL)
    code = "from fastssl.cli import main; main()"
    flags = ("--run", str(run), "--checkpoint-s", "0.05")
    return [sys.executable, "-c", code, "train", *arguments, *flags]


def start(run: Path, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(run, *arguments), stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT
    )


def wait_for_progress(process: subprocess.Popen[str], run: Path, reports: int) -> None:
    """Wait until the run has written `reports` reports or has ended."""
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.exists() and metrics.read_text().count("\n") >= reports
    ):
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    out, err = start(run).communicate()
    assert (run / "backbone.safetensors").exists(), out + err
    return load_file(run / "backbone.safetensors")


def assert_equal_weights(run: Path, expected: dict[str, torch.Tensor]) -> None:
    weights = load_file(run / "backbone.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def assert_killed_twice_ends_alike(
    run: Path, seed: int, expected: dict[str, torch.Tensor], *arguments: str
) -> None:
    """SIGKILL at two random moments of training, each after at least one more report."""
    rng = random.Random(seed)
    for reports in (1, 3):
        process = start(run, *arguments)
        wait_for_progress(process, run, reports)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
    out, err = start(run, *arguments).communicate()
    assert "resumed at step" in out, out + err
    assert_equal_weights(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_killed_twice_it_ends_with_the_same_weights(
    trial: int, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    assert_killed_twice_ends_alike(tmp_path / "run", trial, uninterrupted)


@pytest.fixture(scope="module", params=["dali", "ffcv"])
def on_jpegs(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """A run with a streaming engine: its arguments, and its weights when uninterrupted."""
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(data / "imagenette-224-1000.tar") as tar:
        members = [m for m in tar if m.isfile()]
        tar.extractall(folder / "jpegs", members[::4], filter="data")
    arguments = ["barlow-cpu", "--data", str(folder / "jpegs"), "--engine", request.param, *SMALL]
    arguments += ["--batch-size", "32", "--image-size", "32", "--load-size", "32"]
    arguments += ["--projector-width", "16", "--log-every", "3"]
    out, err = start(folder / "run", *arguments).communicate()
    weights = folder / "run" / "backbone.safetensors"
    assert weights.exists(), out + err
    return arguments, load_file(weights)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS if TRIALS > 3 else 1))
def test_killed_twice_streaming_engines_resume(
    trial: int, on_jpegs: tuple[list[str], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    arguments, weights = on_jpegs
    assert_killed_twice_ends_alike(tmp_path / "run", trial, weights, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_saves_and_the_same_command_resumes(
    number: signal.Signals, code: int, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    run = tmp_path / "run"
    process = start(run)
    wait_for_progress(process, run, 2)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    received, stopped = err.splitlines()
    assert received.startswith(f"fastssl: {number.name} received: saving after the current step")
    assert stopped == f"fastssl: stopped by {number.name}; the same command resumes the run"
    out, _ = start(run).communicate()
    assert "resumed at step" in out
    assert_equal_weights(run, uninterrupted)


def signalled(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int
) -> None:
    """Raise the signal at the end of the given call of owner.name, and only there."""
    original, calls = getattr(owner, name), 0

    def wrapper(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        result = original(*arguments, **named)
        calls += 1
        if calls == call:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(owner, name, wrapper)


PHASES: dict[str, tuple[Callable[[], Any], str, int, int, str | None]] = {
    # phase: module, function, number of its call, signal, log of the same command afterwards
    "loading": (lambda: fastssl.data.loading, "open_split", 1, signal.SIGTERM, None),
    "compiling": (lambda: fastssl.step.Model, "forward", 1, signal.SIGINT, "resumed at step 1 of"),
    "updating": (lambda: fastssl.step.Step, "_update", 5, signal.SIGUSR1, "resumed at step 5 of"),
    "saving": (
        lambda: fastssl.runtime.checkpoint,
        "_sync_folder",
        2,
        signal.SIGTERM,
        "resumed at step",
    ),
    "probing": (
        lambda: fastssl.evaluation.online_knn,
        "knn_accuracy",
        1,
        signal.SIGTERM,
        "resumed at step 11 of",
    ),
    "evaluating": (
        lambda: fastssl.evaluation.probes.ProbedFeatures,
        "probe",
        2,
        signal.SIGTERM,
        "resumed at step 22 of 22",
    ),
}


SHORT = ["train", "digits-diet", *SMALL[2:], "--epochs", "2", "--warmup-epochs", "1"]


@pytest.fixture(scope="module")
def uninterrupted_short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run([*SHORT, "--run", str(folder)]) == 0
    return load_file(folder / "backbone.safetensors")


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(
    phase: str,
    tmp_path: Path,
    uninterrupted_short: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, call, number, expected = PHASES[phase]
    seconds = "0" if phase == "saving" else "1000"
    flags = ["--probe-epochs", "1", "--checkpoint-s", seconds]
    stopped = [*SHORT, *flags, "--run", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        signalled(patch, owner(), name, call, number)
        assert run(stopped) == 128 + number
    capsys.readouterr()
    assert run(stopped) == 0
    out = capsys.readouterr().out
    assert expected in out if expected else "resumed" not in out
    assert_equal_weights(tmp_path / "run", uninterrupted_short)
