"""Ranks: W of them with batches of N / W take the step of one with N; a run whose rank dies resumes
on another number of ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastssl
import fastssl.train
from fastssl.cli import run
from fastssl.data.splits import ArraySplit
from fastssl.distributed import (
    SINGLE_PROCESS,
    Ranks,
    global_batch_norm,
    init_distributed,
    rank_batch,
)
from fastssl.evaluation.probes import ProbedFeatures
from fastssl.evaluation.protocols import evaluate_run
from fastssl.objectives import METHODS, build_objective, configured
from fastssl.objectives.oracles import LabelOracle, uses_oracle
from fastssl.pretrain import pretrain
from fastssl.recipes import recipe_config
from fastssl.runtime.checkpoint import save_checkpoint
from fastssl.runtime.metrics_log import read_metrics
from fastssl.step import Model, Step, _data_parallel
from tests.helpers.gloo import on_launched_ranks, on_ranks

N, F, M = 8, 6, 24  # a batch, features, the data set
SMALL = recipe_config("digits-barlow", projector_width=16, lambd=None)
CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS if method != "sdiet"},
    **{f"pal {m}": {"method": m, "oracle": "labels"} for m in ("barlow", "vicreg", "simclr")},
    "vicreg by mean": {"method": "vicreg", "views": 3, "pairing": "mean"},
    "diet sharded": {"method": "diet", "fused_head": True},
}


def model_of(case: str, ranks: Ranks) -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, F), nn.BatchNorm1d(F), nn.ReLU())
    config = configured(SMALL, **CASES[case])
    oracle = LabelOracle(torch.arange(M) % 3) if uses_oracle(config) else None
    objective = build_objective(config, features=F, num_samples=M, oracle=oracle, group=ranks.group)
    return global_batch_norm(Model(net, objective).double(), ranks)


def gradients(rank: int, world: int) -> dict[str, Any]:
    """case -> loss and gradients of this rank's share of one batch, after averaging."""
    ranks = SINGLE_PROCESS if world == 1 else Ranks(rank, world, dist.group.WORLD, dist.group.WORLD)
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(4, N, 3, 2, 2, generator=generator, dtype=torch.float64)
    index = torch.randperm(M, generator=generator)[:N]
    share = slice(rank * N // world, (rank + 1) * N // world)
    found = {}
    for case, settings in CASES.items():
        model, count = model_of(case, ranks), settings.get("views", 2)
        parallel = _data_parallel(model, ranks)  # referenced until the gradients are averaged
        metrics, _ = parallel([v[share] for v in views[:count]], index[share])
        metrics["loss"].backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        statistics = {k: b for k, b in model.named_buffers() if "running" in k}
        found[case] = metrics["loss"].detach(), grads, statistics
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_have_the_loss_and_gradients_of_one_process(world: int) -> None:
    single = gradients(0, 1)
    all_ranks = on_ranks(world, gradients)
    for case in CASES:
        loss, grads, statistics = single[case]
        losses = torch.stack([found[case][0] for found in all_ranks])
        assert (losses.mean() - loss).abs() < 1e-10 * loss.abs(), case
        total = nn.utils.get_total_norm(grads.values())  # a bias before batch norm has gradient 0
        for _, shared, running in (found[case] for found in all_ranks):
            assert shared.keys() == grads.keys()
            for name, gradient in grads.items():
                assert (shared[name] - gradient).norm() < 1e-10 * total, (case, name)
            for name, buffer in statistics.items():
                torch.testing.assert_close(running[name], buffer, msg=name)


def training(rank: int, world: int, folder: str, dies_at: int) -> float:
    """A short run whose rank 1 dies; seconds until this rank ended."""
    fastssl.train.CheckpointTimer.is_due = lambda clock: True  # type: ignore[method-assign]
    calls, step = 0, Step.__call__

    def mortal(self: Step, views: Sequence[Tensor], index: Tensor, lr: float) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == dies_at:
            os._exit(17)
        return step(self, views, index, lr)

    Step.__call__ = mortal  # type: ignore[method-assign]
    begin = time.monotonic()
    try:
        pretrain(RUN, Path(folder), lambda line: None)
    except RuntimeError:  # the collective that the dead rank left
        assert dies_at
    return time.monotonic() - begin


RUN = configured(
    SMALL,
    backbone="fastnet-4",
    epochs=1,
    warmup_epochs=0,
    optimizer="sgd",
    lr=1e-3,  # small, so that rounding does not grow from step to step
    method="vicreg",
    projector_width=32,
    global_batch=128,
    sync_batchnorm=True,
    label_draws=1,
    log_every=1,
)


def test_a_rank_dies_and_another_number_of_ranks_resumes(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(RUN, whole, lambda line: None)
    with pytest.raises(Exception, match=r"exit code 17|terminated"):
        on_ranks(2, training, str(cut), 7)
    assert not (cut / "summary.json").exists()
    logged: list[str] = []
    pretrain(RUN, cut, logged.append)
    assert any("resumed at step 6" in line for line in logged)
    assert any("resuming on 1 ranks; the run had 2" in line for line in logged)
    one, two = read_metrics(whole / "metrics.jsonl"), read_metrics(cut / "metrics.jsonl")
    assert [m["step"] for m in two] == list(range(1, 12))
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=2e-3)
    for a, b in zip(one, two, strict=True):  # fp32: what differs grows from step to step
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3), a["step"]
    with pytest.raises(ValueError, match="finished"):
        pretrain(RUN, cut, logged.append)


def test_another_global_batch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*inputs: object) -> None:
        raise KeyboardInterrupt

    plain = configured(RUN, global_batch=0)
    monkeypatch.setattr(fastssl.train.CheckpointTimer, "is_due", lambda clock: True)
    monkeypatch.setattr(fastssl.train.Watchdog, "step_done", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(plain, tmp_path / "run", lambda line: None)
    monkeypatch.undo()
    two = Ranks(0, 2)
    monkeypatch.setattr("fastssl.pretrain.init_distributed", lambda device: _context(two))
    monkeypatch.setattr(Ranks, "all_reduce_max", lambda self, *numbers: list(numbers))
    with pytest.raises(ValueError, match="128 images in a batch over all ranks, this one has 256"):
        pretrain(plain, tmp_path / "run", lambda line: None)


def _context(ranks: Ranks) -> Any:
    from contextlib import nullcontext

    return nullcontext(ranks)


def test_a_method_that_ranks_cannot_share_is_refused() -> None:
    config = configured(SMALL, method="sdiet")
    with pytest.raises(ValueError, match="--method sdiet updates its rows in one process"):
        build_objective(config, features=F, num_samples=M, group=object())


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    assert rank_batch(configured(SMALL, global_batch=96), 3) == 32
    assert rank_batch(SMALL, 3) == SMALL.batch_size
    with pytest.raises(ValueError, match="--global-batch 100 is not divisible by 3 ranks"):
        rank_batch(configured(SMALL, global_batch=100), 3)


def test_collectives_of_a_single_process() -> None:
    with init_distributed("cpu") as ranks:
        assert ranks is SINGLE_PROCESS and ranks.is_main and ranks.group is None
    assert (
        SINGLE_PROCESS.all_reduce_max(3, 0) == [3, 0]
        and SINGLE_PROCESS.broadcast(1.5) == 1.5
        and SINGLE_PROCESS.gather("x") == ["x"]
    )


TINY = [
    *("train", "digits-barlow", "--backbone", "fastnet-4", "--epochs", "1", "--device", "cpu"),
    *("--warmup-epochs", "0", "--projector-width", "16", "--label-draws", "1"),
    *("--global-batch", "256"),
]


def command(rank: int, folder: str) -> tuple[int, str, str, float]:
    """`fastssl train` as on a rank of torchrun: exit code, stdout, stderr, seconds."""
    begin = time.monotonic()
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = run([*TINY, "--run", folder])
    return code, out.getvalue(), err.getvalue(), time.monotonic() - begin


def slow_first_rank(rank: int, world: int, folder: str) -> Any:
    """A run where collectives time out after 3 s, and rank 0 takes 4 to convert and to save; the
    budgets of the linear probes that this rank fits, and the images that it extracts."""
    fastssl.distributed.TIMEOUT = timedelta(seconds=3)
    cells: list[Any] = []
    numbers: list[int] = []
    probe, batches = ProbedFeatures.probe, ArraySplit.batches

    def recorded(self: ProbedFeatures, **named: Any) -> Any:
        cells.append(named["count"])
        return probe(self, **named)

    def slow(function: Any) -> Any:
        def slower(*arguments: Any, **named: Any) -> Any:
            time.sleep(4)
            return function(*arguments, **named)

        return slower

    def extracted(self: ArraySplit, chunks: Sequence[Tensor]) -> Any:
        numbers.extend(n for chunk in chunks for n in chunk.tolist())
        return batches(self, chunks)

    ProbedFeatures.probe = recorded  # type: ignore[method-assign]
    ArraySplit.batches = extracted  # type: ignore[method-assign]
    if rank == 0:
        fastssl.pretrain.open_data = slow(fastssl.pretrain.open_data)
        fastssl.runtime.checkpoint.save_checkpoint = slow(save_checkpoint)
    return *command(rank, folder), cells, numbers


def test_ranks_wait_for_a_slow_one_and_share_the_evaluation(tmp_path: Path) -> None:
    """And reach the accuracies of one process."""
    first, second = on_launched_ranks(2, slow_first_rank, str(tmp_path / "run"))
    assert first[0] == second[0] == 0, (first, second)
    assert "accuracy on held-out images" in first[1] and not second[1] and not second[2]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["ranks"] == 2 and first[3] > 8
    table, rank = evaluate_run(tmp_path / "run")
    assert rank == pytest.approx(summary["rankme"], rel=1e-6)
    for kind, cells in table.items():
        for name, accuracy in cells.items():
            assert accuracy.mean == summary["accuracy"][kind][name]["mean"], (kind, name)
    (cells, numbers), (other_cells, other_numbers) = first[4:], second[4:]
    assert len(cells) == len(other_cells) == 6  # of 12
    assert sorted(numbers + other_numbers) == sorted([*range(1438), *range(359)])
    assert len(other_numbers) > 600


def failing(rank: int, world: int, folder: str, error: str) -> tuple[int, str, str, float]:
    """A run where rank 1 alone has an error, or a signal, in its third step."""
    step, steps = Step.__call__, iter(range(1, 100))

    def fail(self: Step, views: Sequence[Tensor], index: Tensor, lr: float) -> Any:
        if next(steps) == 3 and rank == 1:
            if not error.startswith("SIG"):
                raise ValueError(error)
            signal.raise_signal(signal.Signals[error])
        return step(self, views, index, lr)

    Step.__call__ = fail  # type: ignore[method-assign]
    return command(rank, folder)


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        ("its disk is gone", 2, ["", "fastssl: rank 1: its disk is gone\n"]),
        (
            "SIGTERM",
            143,
            ["fastssl: stopped by SIGTERM; the same command resumes the run\n", ""],
        ),
    ],
)
def test_a_failure_ends_all_ranks_and_is_printed_once(
    error: str, code: int, lines: list[str], tmp_path: Path
) -> None:
    ended = on_launched_ranks(2, failing, str(tmp_path / "run"), error)
    assert [err for _, _, err, _ in ended] == lines
    assert [found for found, *_ in ended] == [code, code]
    assert all(seconds < 60 for *_, seconds in ended)


def test_torchrun_prints_a_mistake_once_and_fails(tmp_path: Path) -> None:
    flags = ["--nproc-per-node", "2", "-m", "--", "fastssl", *TINY[:2], "--batch-size", "5000"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *flags, "--run", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastssl: ")]
    assert len(lines) == 1 and "--batch-size 5000 is larger than the data set" in lines[0]
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert not (tmp_path / "run").exists()
