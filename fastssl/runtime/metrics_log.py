"""The log of a run's metrics: JSON lines for programs, a progress bar or plain lines for users."""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsLog:
    """Writes metrics.jsonl and shows progress; a context manager around the training loop.

    On a terminal it shows a bar with views/s, loss and the time left; elsewhere it prints about ten
    lines. Without a path, as on all ranks but rank 0, it does nothing.
    """

    def __init__(
        self, path: Path | None, total: int, start: int = 0, console: Console | None = None
    ):
        if path:
            truncate_after(path, start)
        self._file: TextIO = open(path or os.devnull, "a", buffering=1)
        self._console = console or Console(quiet=path is None)
        self._total = total
        self._lines_at = {round(total * tenth / 10) for tenth in range(1, 11)}
        self._begin = time.perf_counter()
        self._start = start
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

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._file.close()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Report the metrics after `step` steps."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        rate = f"{metrics['views_per_s']:,.0f}"
        self._bar.update(self._task, completed=step, loss=f"{metrics['loss']:.4f}", rate=rate)
        due = {at for at in self._lines_at if at <= step}
        if due and not self._console.is_terminal:
            self._lines_at -= due
            spent_s = time.perf_counter() - self._begin
            left_s = spent_s / max(1, step - self._start) * (self._total - step)
            line = f"step {step}/{self._total}  loss {metrics['loss']:.4f}  {rate} views/s"
            line += f"  {left_s:.0f} s left"
            self._console.print(line, highlight=False)


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


def plot_curves(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and learning rate over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1))
    steps = [m["step"] for m in metrics]
    top.plot(steps, [m["loss"] for m in metrics], color="tab:blue")
    top.set(ylabel="loss", title=title)
    bottom.plot(steps, [m["lr"] for m in metrics], color="tab:orange")
    bottom.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
