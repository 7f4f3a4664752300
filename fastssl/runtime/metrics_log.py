"""The log of a run's metrics: JSON lines for programs, a progress bar or plain lines for users."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastssl.runtime.run_log import QUIET_S, RunLog

FEW = 30  # points, up to which a curve is drawn with markers


class MetricsLog:
    """Writes metrics.jsonl and shows progress; a context manager around the training loop.

    On a terminal it shows a bar with views/s, loss and the time left. A line is logged at each
    tenth of the run and wherever `quiet_s` have passed without one; on a terminal only the file of
    a `RunLog` gets it. Without a path, as on all ranks but rank 0, it does nothing.
    """

    def __init__(
        self,
        path: Path | None,
        total: int,
        start: int = 0,
        log: Callable[[str], None] = print,
        console: Console | None = None,
        quiet_s: float = QUIET_S,
    ):
        if path:
            truncate_after(path, start)
        self._file: TextIO = open(path or os.devnull, "a", buffering=1)
        self._console = console or Console(quiet=path is None)
        self._log = log if isinstance(log, RunLog) else RunLog(log, quiet_s)
        self._quiet = path is None
        self._total, self._quiet_s = total, quiet_s
        self._lines_at = {round(total * tenth / 10) for tenth in range(1, 11)}
        self._begin = self._said = time.perf_counter()
        self._start = self.step = start
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} views/s  left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(
            "train", total=total, completed=start, loss="...", rate="..."
        )
        self._heartbeat = ExitStack()

    def __enter__(self) -> Self:
        self._bar.start()
        if not self._quiet:
            self._heartbeat.enter_context(
                self._log.doing(lambda: f"training, {self.step} of {self._total} steps done")
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._heartbeat.close()
        self._bar.stop()
        self._file.close()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Report the metrics after `step` steps."""
        self.step = step
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        rate = f"{metrics['views_per_s']:,.0f}"
        self._bar.update(self._task, completed=step, loss=f"{metrics['loss']:.4f}", rate=rate)
        due = {at for at in self._lines_at if at <= step}
        now = time.perf_counter()
        if self._quiet or not (due or now - self._said >= self._quiet_s):
            return
        self._lines_at -= due
        self._said = now
        left_s = (now - self._begin) / max(1, step - self._start) * (self._total - step)
        line = f"step {step}/{self._total}  loss {metrics['loss']:.4f}  {rate} views/s"
        self._log.line(f"{line}  {left_s:.0f} s left", shown=not self._console.is_terminal)


def truncate_after(path: Path, step: int) -> None:
    """Drop a file's reports after `step`, which a resumed run writes again, and damaged lines."""
    if path.is_file():
        lines = path.read_text(errors="replace").splitlines()
        earlier = [x for x in lines if (report := _report(x)) and report["step"] <= step]
        path.write_text("".join(line + "\n" for line in earlier))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The reports of a metrics.jsonl; ValueError where a line is damaged."""
    reports = [_report(line) for line in path.read_text(errors="replace").splitlines()]
    if None in reports:
        raise ValueError(f"{path} is damaged in line {reports.index(None) + 1}; delete that line")
    return [report for report in reports if report is not None]


def _report(line: str) -> dict[str, Any] | None:
    """The report in a line, None where a crash has damaged it."""
    try:
        report = json.loads(line)
    except ValueError:
        return None
    return report if isinstance(report, dict) and "step" in report else None


PANELS = {  # of curves.png: metric -> label
    "loss": "loss",
    "lr": "learning rate",
    "rankme": "rank (RankMe)",
    "views_per_s": "views/s",
}


def plot_curves(
    metrics: list[dict[str, Any]],
    title: str,
    path: Path,
    probes: Sequence[dict[str, float]] = (),
) -> None:
    """Loss, learning rate, rank of the features and views/s over the steps, and the accuracies of
    the online probe where there are any, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {
        label: [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        for name, label in PANELS.items()
    }
    curves["online kNN accuracy"] = [(probe["step"], probe["knn"]) for probe in probes]
    curves = {label: points for label, points in curves.items() if points}
    figure, panels = pyplot.subplots(
        len(curves),
        sharex=True,
        squeeze=False,
        figsize=(7, 1 + 1.7 * len(curves)),
        layout="constrained",
    )
    for number, (axes, (label, points)) in enumerate(
        zip(panels[:, 0], curves.items(), strict=True)
    ):
        marker = "o" if len(points) <= FEW else None  # a line through one point is invisible
        axes.plot(*zip(*points, strict=True), color=f"C{number}", marker=marker, markersize=4)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if label != "loss":
            axes.set_ylim(0, 1.1 * max(value for _, value in points) or 1)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    figure.align_ylabels()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
