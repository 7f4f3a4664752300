"""The timing harness measures time and memory, and the bench command ends within its budget."""

import json
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch

from bench.__main__ import timed_rows
from bench.measure import Case, environment, measure, quartiles
from bench.report import (
    PROBES,
    accuracy_table,
    environment_line,
    plot_ratios,
    read_results,
    timing_table,
)
from bench.suites import covariance_losses, softmax_losses, train_step
from fastssl.objectives import configured

ROOT = Path(__file__).parents[2]


def test_times_and_spread() -> None:
    timings = measure(
        {"long": lambda: time.sleep(0.02), "short": lambda: time.sleep(0.005)},
        "cpu",
        seconds=0.1,
        min_runs=4,
    )
    assert 20 <= timings["long"].ms < 40 and 5 <= timings["short"].ms < 20
    low, high = timings["long"].ms_iqr
    assert low <= timings["long"].ms <= high and timings["long"].n == 4


def test_memory_is_the_peak_of_live_tensors() -> None:
    def call() -> None:
        first = torch.zeros(2**20)  # 4 MiB
        second = first + 1  # 8 MiB live
        del first
        (second * 2).sum()  # 8 MiB live again

    assert measure({"call": call}, "cpu", seconds=0.01, min_runs=1)[
        "call"
    ].peak_mib == pytest.approx(8, abs=0.1)


def test_quartiles() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def case(name: str, fails: bool = False) -> Case:
    def check(variants: object) -> None:
        assert not fails, "variants disagree"

    x = torch.ones(1000)
    return Case(
        name,
        {"N": 1000},
        lambda: {"eager": lambda: x + 1, "twice": lambda: x + 1 + 1},
        check,
        {"items": 1000},
    )


def test_rows_check_before_they_time() -> None:
    rows = list(timed_rows([case("wrong", fails=True), case("right")], "cpu", time.monotonic() + 1))
    assert rows[0] == {
        "case": "wrong",
        "parameters": {"N": 1000},
        "floor_ms": None,
        "failed": "AssertionError: variants disagree",
    }
    assert [row["variant"] for row in rows[1:]] == ["eager", "twice"]
    assert rows[1]["times_reference"] == 1.0
    assert rows[2]["items_per_s"] == pytest.approx(1000 / rows[2]["ms"] * 1e3)
    assert list(timed_rows([case("late")], "cpu", time.monotonic() - 1)) == []


def test_steps_train_with_torchvision_and_with_fastssl() -> None:
    config, height, width = next(iter(train_step.CPU_SETTINGS.values()))
    variants = train_step._variants(configured(config, batch_size=8, device="cpu"), height, width)
    train_step._check(variants)
    assert len(variants) == 2
    with pytest.raises(AssertionError, match="nan"):
        train_step._check({**variants, "broken": lambda: float("nan")})


def test_environment_of_a_measurement() -> None:
    stamp = environment()
    assert (
        stamp["torch"] == torch.__version__
        and stamp["threads"] == torch.get_num_threads()
        and stamp["cpu"]
    )
    assert torch.__version__ in environment_line(stamp)


def test_report(tmp_path: Path) -> None:
    rows = [
        {"suite": "losses", **row}
        for row in timed_rows([case("a"), case("b", fails=True)], "cpu", time.monotonic() + 1)
    ]
    file = tmp_path / "losses.jsonl"
    lines = [
        json.dumps({"environment": environment(), "suite": "losses"}),
        *(json.dumps(row) for row in rows),
    ]
    file.write_text("\n".join(lines) + '\n{"cut o')
    stamp, read = read_results(file)
    assert read == json.loads(json.dumps(rows)) and stamp["torch"] == torch.__version__
    table = timing_table(read)
    assert (
        "| a | twice |" in table and "| b | failed | AssertionError: variants disagree |" in table
    )
    plot_ratios(read, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_speeds_are_grouped_by_case_and_ours_stand_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    ratios = {"pipeline a": {"peer": 1.0, "slow": 0.5, "fastssl": 8.0}, "b": {"peer": 1.0}}
    rows = [
        {"case": case, "variant": name, "ms": 1 / ratio, "times_reference": ratio, "n": 3}
        for case, variants in ratios.items()
        for name, ratio in variants.items()
    ]
    plot_ratios(rows, tmp_path / "plot.png")
    monkeypatch.undo()
    first, second = kept[0].axes
    titles = [axes.get_title(loc="left") for axes in (first, second)]
    assert titles == ["images in memory to views: a (n = 3)", "b (n = 3)"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["peer", "slow", "fastssl"]
    assert [bar.get_width() for bar in first.patches] == [1.0, 0.5, 8.0]
    assert len({bar.get_facecolor() for bar in first.patches}) == 2
    assert all(text.get_position()[0] > 1 for text in first.texts)  # beside the line at 1
    pyplot.close(kept[0])


def test_accuracy_table_is_the_mean_over_seeds() -> None:
    features = ("raw pixels", "untrained", "pretrained")
    runs = [
        {"case": "digits-diet", "parameters": {"seed": seed}, "train_s": 12.0}
        | {f"{f}_{p}": value for f in features for p in PROBES}
        for seed, value in enumerate((0.90, 0.94))
    ]
    table = accuracy_table(runs)
    assert "| digits-diet | 2 | 12.0 ± 0.0 | pretrained | 0.920 ± 0.028 |" in table
    assert table.count("\n") == 4


@pytest.mark.slow
def test_the_command_ends_inside_its_budget(tmp_path: Path) -> None:
    """With far more to measure than fits, and calls of seconds among it."""
    path = ":".join(str(ROOT / part) for part in (".", "kernels", "pipelines"))
    command = [sys.executable, "-m", "bench", "--out", str(tmp_path), "--only", "losses"]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, "--budget-s", "20"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 21
    stamp, rows = read_results(tmp_path / "losses.jsonl")
    assert stamp["cpu"] and not [row for row in rows if "failed" in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coding rate V=20", "nt-xent"])
def test_variants_of_a_case_agree(name: str) -> None:
    """What the command checks before it times, on a case of each file of losses."""
    cases = chain(covariance_losses.cases("cpu"), softmax_losses.cases("cpu"))
    chosen = next(case for case in cases if name in case.name)
    variants = chosen.build()
    assert len(variants) > 1
    chosen.check(variants)
