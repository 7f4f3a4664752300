"""Tables and figures of the accuracy experiments: python -m bench.experiments FOLDER.

Reads accuracy-*.jsonl and lightly.jsonl of a results folder, prints their tables, and plots
accuracy-against-time.png, error-against-time.png and diet-loss.png beside them.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.report import Row, markdown, mean_std, plain_ticks, read_results

GOAL = 0.8  # of arXiv:2312.10725 on CIFAR-10, with a ResNet-18
PROBES = ("knn_all", "linear_all", "knn_10", "linear_10")


def by_case(rows: list[Row]) -> dict[str, list[Row]]:
    """The runs of each case, in the order of the cases; failures are left out."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "failed" not in row:
            found.setdefault(row["case"], []).append(row)
    return found


def methods_table(rows: list[Row]) -> str:
    """One line per recipe, below those of raw pixels and of the untrained net."""
    cases = by_case(rows)
    head = ["features", "n", "training s", "views/s", *(p.replace("_", " ") for p in PROBES)]
    first = next(iter(cases.values()))
    lines = [
        [feature, str(len(first)), "", "", *_cells(first, feature)]
        for feature in ("raw pixels", "untrained")
    ]
    for case, runs in cases.items():
        seconds = mean_std([run["train_s"] for run in runs], 0)
        speed = f"{statistics.mean(run['views_per_s'] for run in runs):,.0f}"
        lines.append([case, str(len(runs)), seconds, speed, *_cells(runs, "pretrained")])
    return markdown(head, lines)


def _cells(runs: list[Row], feature: str) -> list[str]:
    return [mean_std([run[f"{feature}_{probe}"] for run in runs]) for probe in PROBES]


def gain_table(rows: list[Row]) -> str:
    """Time to lightly's accuracy, one change after another."""
    cases = by_case(rows)
    head = ["", "n", "views/s", "training s", "final kNN", "s to target", "times faster"]
    lines = []
    for case, runs in cases.items():
        reached = [run["seconds_to_target"] for run in runs]
        times = [run["times_faster"] for run in runs]
        seen = all(value is not None for value in reached)
        lines.append(
            [
                case,
                str(len(runs)),
                f"{statistics.mean(run['views_per_s'] for run in runs):,.0f}",
                mean_std([run["train_s"] for run in runs], 0),
                mean_std([run["probes"][-1]["knn"] for run in runs]),
                mean_std(reached, 0) if seen else "not reached",
                mean_std(times, 1) if seen else "",
            ]
        )
    return markdown(head, lines)


def time_to_table(rows: list[Row]) -> str:
    """Seconds to a kNN accuracy of 80 %, or, where no run reaches it, to the final accuracy of the
    first case, mean over its seeds."""
    cases = by_case(rows)
    target = statistics.mean(run["probes"][-1]["knn"] for run in next(iter(cases.values())))
    if any(time_to(run["probes"], GOAL) for runs in cases.values() for run in runs):
        target = GOAL
    head = ["", "n", "training s", "final kNN", "final linear", f"s to kNN {target:.3f}"]
    lines = []
    for case, runs in cases.items():
        found = [time_to(run["probes"], target) for run in runs]
        reached = [seconds for seconds in found if seconds is not None]
        when = mean_std(reached, 0) if reached else "not reached"
        if 0 < len(reached) < len(runs):
            when += f" ({len(reached)} of {len(runs)} runs)"
        seconds = mean_std([run["train_s"] for run in runs], 0)
        final = [run["probes"][-1]["knn"] for run in runs]
        linear = [run["pretrained_linear_all"] for run in runs]
        lines.append([case, str(len(runs)), seconds, mean_std(final), mean_std(linear), when])
    return markdown(head, lines)


def time_to(probes: list[Row], target: float) -> float | None:
    """Seconds of training at the first probe that reaches `target`."""
    return next((p["train_s"] for p in probes if p["knn"] >= target), None)


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by the first word of their case."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"].split(",")[0], []).append(row)
    return found


def plot_accuracy_against_time(rows: list[Row], path: Path) -> None:
    """A line per run: kNN accuracy of the online probe against seconds of training; a panel per
    method."""
    methods = by_method(rows)

    def plot(panels: Sequence[Any]) -> None:
        for axes, (method, method_rows) in zip(panels, methods.items(), strict=True):
            for number, (case, runs) in enumerate(by_case(method_rows).items()):
                for run in runs:
                    x, y = zip(*((p["train_s"], p["knn"]) for p in run["probes"]), strict=True)
                    label = case.removeprefix(f"{method}, ") if run is runs[0] else None
                    axes.plot(x, y, color=f"C{number}", marker=".", label=label, alpha=0.8)
            axes.set_title(method)
            axes.set(xlabel="seconds of training", ylabel="kNN accuracy")
            _log_seconds(axes)
            axes.legend()

    _figure(plot, path, panels=len(methods))


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of the points that none beats in both seconds and error, fastest first."""
    best, names = float("inf"), []
    for name, (_, error) in sorted(points.items(), key=lambda item: item[1]):
        if error < best:
            best = error
            names.append(name)
    return names


def plot_error_against_time(rows: list[Row], path: Path) -> None:
    """A point per case: the linear probe's error with all labels against seconds of training, mean
    over seeds, and the Pareto front of them."""
    points = {
        case: (
            statistics.mean(run["train_s"] for run in runs),
            1 - statistics.mean(run["pretrained_linear_all"] for run in runs),
        )
        for case, runs in by_case(rows).items()
    }
    names = pareto_front(points)

    def plot(panels: Sequence[Any]) -> None:
        (axes,) = panels
        axes.scatter(*zip(*points.values(), strict=True), s=18, color="C0", alpha=0.6)
        axes.plot(*zip(*(points[name] for name in names), strict=True), "o-", color="C1")
        for number, name in enumerate(names, start=1):  # names would cover other points
            label = f"{number}: {name.removeprefix('cifar-small-')}"
            axes.plot(*points[name], "o", markersize=13, color="C1", label=label)
            axes.annotate(str(number), points[name], ha="center", va="center", fontsize=9)
        axes.set(xlabel="seconds of training", ylabel="error of the linear probe")
        _log_seconds(axes)
        axes.legend(title="Pareto front", handlelength=0, markerscale=0, loc="upper center")

    _figure(plot, path)


def _log_seconds(axes: Any) -> None:
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, *axes.get_xlim())


def plot_loss_against_probe(rows: list[Row], path: Path) -> None:
    """A point per probe: the training loss at that step against its kNN accuracy."""

    def plot(panels: Sequence[Any]) -> None:
        (axes,) = panels
        for number, row in enumerate(rows):
            points = [(p["loss"], p["knn"]) for p in row["probes"] if p["loss"] is not None]
            axes.scatter(*zip(*points, strict=True), color=f"C{number}", s=18)
            axes.plot([], [], "o", color=f"C{number}", label=f"seed {row['parameters']['seed']}")
        axes.set(xlabel="DIET's training loss", ylabel="kNN accuracy")
        axes.legend()

    _figure(plot, path)


def rank_correlation(rows: list[Row]) -> float:
    """Spearman's correlation of training loss and probe accuracy over all probes of the rows."""
    points = [(p["loss"], p["knn"]) for r in rows for p in r["probes"] if p["loss"] is not None]
    loss, knn = (_ranks([point[k] for point in points]) for k in (0, 1))
    return statistics.correlation(loss, knn)


def _ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    for rank, position in enumerate(order):
        ranks[position] = float(rank)
    return ranks


def _figure(plot: Callable[[Sequence[Any]], None], path: Path, panels: int = 1) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, panels, figsize=(3.5 + 3.5 * panels, 4.2), sharey=True, squeeze=False
    )
    plot(axes[0])
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def tables(folder: Path) -> dict[str, str]:
    """The README's tables of a results folder, by the name of the file they come from."""
    found = {path.stem: read_results(path)[1] for path in folder.glob("*.jsonl")}
    result = {}
    for name in ("accuracy-methods", "accuracy-emp_ssl", "accuracy-engines"):
        if rows := found.get(name):
            result[name] = methods_table(rows)
    for name in ("accuracy-views", "accuracy-data"):
        for method, rows in by_method(found.get(name, [])).items():
            result[f"{name}, {method}"] = time_to_table(rows)
    if rows := found.get("lightly"):
        result["lightly"] = gain_table(rows)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, table in tables(folder).items():
        print(f"## {name}\n\n{table}\n")
    found = {path.stem: read_results(path)[1] for path in folder.glob("accuracy-*.jsonl")}
    if rows := found.get("accuracy-views"):
        plot_accuracy_against_time(rows, folder / "accuracy-against-time.png")
    one_net = ("accuracy-methods", "accuracy-views", "accuracy-data", "accuracy-emp_ssl")
    if rows := [row for name in one_net for row in found.get(name, [])]:
        plot_error_against_time(rows, folder / "error-against-time.png")
    if rows := found.get("accuracy-diet"):
        print(f"rank correlation of DIET's loss and kNN: {rank_correlation(rows):.2f}")
        plot_loss_against_probe(rows, folder / "diet-loss.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
