"""The log of a run: its file, its heartbeat, and the metrics' lines by tenth and by time."""

import io
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from fastssl.runtime.metrics_log import MetricsLog, plot_curves
from fastssl.runtime.run_log import RunLog

METRICS = {"loss": 2.0, "views_per_s": 10.0, "lr": 1e-3}


def test_lines_reach_the_screen_and_the_file(tmp_path: Path) -> None:
    shown: list[str] = []
    with RunLog(shown.append) as log:
        log("before there is a file")
        log.write_to(tmp_path / "log.txt")
        log("±")
        log.line("for the file alone", shown=False)
    assert shown == ["before there is a file", "±"]
    lines = ["before there is a file", "±", "for the file alone"]
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines() == lines
    with RunLog(shown.append) as log:  # a resumed run appends
        log.write_to(tmp_path / "log.txt")
        log("resumed")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()[-1] == "resumed"


def test_an_error_is_the_last_line_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError), RunLog(lambda line: None) as log:
        log.write_to(tmp_path / "log.txt")
        raise ValueError("a cause")
    assert (tmp_path / "log.txt").read_text() == "ended by ValueError: a cause\n"


def test_silence_is_ended_by_what_is_done_and_activity_is_not() -> None:
    shown: list[str] = []
    log = RunLog(shown.append, quiet_s=0.1)
    with log.doing(lambda: "decoding"):
        deadline = time.monotonic() + 5
        while len(shown) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(shown) >= 2
    assert all(line.startswith("decoding, for ") and "s so far" in line for line in shown)
    assert not [t for t in threading.enumerate() if t.name == "fastssl-heartbeat"]
    log = RunLog(shown.append, quiet_s=30)
    del shown[:]
    with log.doing("idle"):
        log("a line")
    assert shown == ["a line"]


def test_metrics_are_logged_at_each_tenth_and_where_it_was_quiet(tmp_path: Path) -> None:
    def lines(quiet_s: float) -> list[str]:
        shown: list[str] = []
        with MetricsLog(tmp_path / "m.jsonl", 1000, log=shown.append, quiet_s=quiet_s) as metrics:
            for step in (50, 100, 150, 160):
                metrics.write(step, METRICS)
        return [line.split()[1] for line in shown if line.startswith("step ")]

    assert lines(quiet_s=1e9) == ["100/1000"]
    assert lines(quiet_s=0.0) == ["50/1000", "100/1000", "150/1000", "160/1000"]


def test_on_a_terminal_the_bar_is_shown_and_the_file_has_the_lines(tmp_path: Path) -> None:
    screen, shown = io.StringIO(), []  # type: ignore[var-annotated]
    console = Console(file=screen, force_terminal=True)
    with RunLog(shown.append) as log:
        log.write_to(tmp_path / "log.txt")
        with MetricsLog(tmp_path / "m.jsonl", 10, log=log, console=console) as metrics:
            metrics.write(10, METRICS)
    assert not shown and "views/s" in screen.getvalue()
    assert (tmp_path / "log.txt").read_text().startswith("step 10/10  loss 2.0000  10 views/s")


def test_the_ranks_without_a_path_are_silent() -> None:
    shown: list[str] = []
    with MetricsLog(None, 10, log=shown.append, quiet_s=0.0) as metrics:
        metrics.write(10, METRICS)
    assert not shown


@pytest.mark.parametrize("probes", [[], [{"step": 4, "knn": 0.5}]])
@pytest.mark.parametrize("points", [1, 40])
def test_curves_have_a_panel_for_what_was_measured(
    points: int, probes: list[dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    metrics = [{"step": step, **METRICS} for step in range(points)]
    metrics[-1]["rankme"] = 7.0  # not at each report
    plot_curves(metrics, "a run", tmp_path / "curves.png", probes)
    monkeypatch.undo()
    (figure,) = kept
    labels = ["loss", "learning rate", "rank (RankMe)", "views/s"]
    panels = list(figure.axes)
    assert [axes.get_ylabel() for axes in panels] == labels + ["online kNN accuracy"] * len(probes)
    loss = panels[0].lines[0]
    assert list(loss.get_ydata()) == [2.0] * points
    assert (loss.get_marker() == "o") == (points == 1)
    assert list(panels[2].lines[0].get_ydata()) == [7.0]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    pyplot.close(figure)
