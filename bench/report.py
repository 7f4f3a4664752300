"""Markdown tables and a plot of results: python -m bench.report FOLDER... [--plot PNG]."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_results(path: Path) -> tuple[Row, list[Row]]:
    """(environment, rows) of one results file; a cut-off last line is left out."""
    lines = path.read_text().splitlines()
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return parsed[0]["environment"], parsed[1:]


def environment_line(stamp: Row) -> str:
    """Device, power limit and versions, as one line under a table."""
    device = stamp.get("gpu") or f"{stamp['cpu']}, {stamp['threads']} threads"
    if watts := stamp.get("gpu_power_limit_w"):
        device += f", {watts:.0f} W"
    versions = ", ".join(
        f"{name} {stamp[name]}" for name in ("torch", "triton", "python") if stamp.get(name)
    )
    return f"{device}; {versions}"


def timing_table(rows: list[Row]) -> str:
    """Time, spread, ratio and memory by case and variant; on a CPU only ratios are meaningful."""
    graphs = any(row.get("graph_ms") for row in rows)
    head = [
        "case",
        "variant",
        "ms (IQR)",
        "CUDA graph ms",
        "of floor",
        "times reference",
        "peak MiB",
    ]
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["case"], "failed", row["failed"], "", "", "", ""])
            continue
        low, high = row["ms_iqr"]
        best = row.get("graph_ms") or row["ms"]
        floor = f"{100 * row['floor_ms'] / best:.0f} %" if row.get("floor_ms") else ""
        graph = f"{row['graph_ms']:.4g}" if row.get("graph_ms") else ""
        times = f"{row['ms']:.4g} ({low:.4g} to {high:.4g}, n {row['n']})"
        ratio, peak = f"{row['times_reference']:.2f}", f"{row['peak_mib']:.1f}"
        lines.append([row["case"], row["variant"], times, graph, floor, ratio, peak])
    columns = [
        k for k, name in enumerate(head) if graphs or name not in ("CUDA graph ms", "of floor")
    ]
    return markdown([head[k] for k in columns], [[line[k] for k in columns] for line in lines])


def views_table(rows: list[Row]) -> str:
    """Time of each loader of images in memory, as a multiple of fastssl's."""
    cases = _variants(rows, "pipeline ")
    head = ["time of a pass over fastssl's", *(f"{c} (n = {v['fastssl']['n']})" for c, v in cases)]
    peers = [name for name in cases[0][1] if name != "fastssl"]
    lines = [
        [peer, *(f"{v[peer]['ms'] / v['fastssl']['ms']:.3g} x" for _, v in cases)] for peer in peers
    ]
    return markdown(head, lines)


def jpeg_table(rows: list[Row]) -> str:
    """Speed of the engines that decode, as a multiple of each peer's."""
    lines = []
    for case, variants in _variants(rows, "JPEG "):
        for peer in (name for name in variants if not name.startswith("fastssl")):
            ms = {engine: variants[f"fastssl {engine}"]["ms"] for engine in ("dali", "ffcv")}
            ratios = [f"{variants[peer]['ms'] / ms[engine]:.3g} x" for engine in ms]
            lines.append([case, peer, *ratios, str(variants[peer]["n"])])
    return markdown(["views", "beside", "`dali`", "`ffcv`", "n"], lines)


def _variants(rows: list[Row], prefix: str) -> list[tuple[str, dict[str, Row]]]:
    """(case without `prefix`, its rows by variant), in the order they were measured."""
    names = dict.fromkeys(row["case"] for row in rows if row["case"].startswith(prefix))
    return [
        (name.removeprefix(prefix), {r["variant"]: r for r in rows if r["case"] == name})
        for name in names
    ]


def ratio_table(rows: list[Row]) -> str:
    """Speed of each variant as a multiple of its case's first, and both memories.

    For READMEs: on a CPU only ratios within one run are quoted. Sweeps ("against") are left out.
    """
    head = ["case", "variant", "times faster", "than", "n", "peak MiB", "of the other"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows if "ms" in row):
        if "against" in case:
            continue
        first, *others = [row for row in rows if row["case"] == case]
        for row in others:
            times = [f"{row['times_reference']:.2f}", first["variant"], str(row["n"])]
            memory = [f"{r['peak_mib']:.0f}" for r in (row, first)]
            lines.append([case, row["variant"], *times, *memory])
    return markdown(head, lines)


PROBES = ("linear_all", "knn_all", "linear_10", "knn_10", "linear_1", "knn_1")


def accuracy_table(rows: list[Row]) -> str:
    """One line per recipe and kind of feature: mean and deviation over seeds.

    `linear_10` is the linear probe with 10 labels per class.
    """
    head = ["recipe", "n", "training s", "features", *(probe.replace("_", " ") for probe in PROBES)]
    lines = [[row["case"], "failed", row["failed"]] for row in rows if "failed" in row]
    runs = [row for row in rows if "failed" not in row]
    for case in dict.fromkeys(row["case"] for row in runs):
        seeds = [row for row in runs if row["case"] == case]
        for feature in ("raw pixels", "untrained", "pretrained"):
            cells = [mean_std([s[f"{feature}_{p}"] for s in seeds]) for p in PROBES]
            seconds = mean_std([s["train_s"] for s in seeds], 1)
            lines.append([case, str(len(seeds)), seconds, feature, *cells])
    return markdown(head, lines)


def mean_std(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot_ratios(rows: list[Row], path: Path) -> None:
    """Bars: speed of each variant as a multiple of its case's reference, which is 1; a panel per
    case, ours in another colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "ms" in row]
    cases = list(dict.fromkeys(row["case"] for row in timed))
    bars = [[row for row in timed if row["case"] == case] for case in cases]
    figure, panels = pyplot.subplots(
        len(cases),
        sharex=True,
        squeeze=False,
        figsize=(8, sum(0.6 + 0.27 * len(b) for b in bars) + 0.5),
        height_ratios=[len(b) + 1 for b in bars],
        layout="constrained",
    )
    for axes, case, variants in zip(panels[:, 0], cases, bars, strict=True):
        values = [row["times_reference"] for row in variants]
        colors = ["C1" if row["variant"].startswith("fastssl") else "C0" for row in variants]
        # a position per row: two rows of a case may have one name
        axes.barh(range(len(values)), values, color=colors)
        for position, value in enumerate(values):  # right of the line at 1, never on it
            axes.text(1.04 * max(value, 1), position, f"{value:.3g} x", va="center", fontsize=8)
        axes.set_yticks(range(len(values)), [row["variant"] for row in variants], fontsize=8)
        title = f"{_title(case)} (n = {min(row['n'] for row in variants)})"
        axes.set_title(title, loc="left", fontsize=9)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    ratios = [row["times_reference"] for row in timed]
    plain_ticks(axes.xaxis, min(0.5, *ratios), 1.6 * max(ratios))
    axes.set(xlim=(min(0.5, *ratios) * 0.8, 1.6 * max(ratios)))
    axes.set_xlabel("speed, as a multiple of the first loader or loss of each group (log scale)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _title(case: str) -> str:
    """What a case of the pipelines measures; the name of any other."""
    names = {"pipeline ": "images in memory to views: ", "JPEG ": "JPEG to views: "}
    for prefix, words in names.items():
        if case.startswith(prefix):
            return words + case.removeprefix(prefix)
    return case


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks 1, 2, 5, 10, ... between `low` and `high` of a logarithmic axis, as plain numbers."""
    steps = (1, 2, 5) if high / low < 1e3 else (1,)
    ticks = [float(f"{d}e{e}") for e in range(-4, 10) for d in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.minorticks_off()


def plot_sweep(rows: list[Row], path: Path, *, against: str, x: str, y: str, title: str) -> None:
    """Two panels, time and peak memory against the parameter `against`: a line for each variant.

    x and y are the labels of the axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    timed = [row for row in rows if "ms" in row]
    for name in dict.fromkeys(row["variant"] for row in timed):
        series = [row for row in timed if row["variant"] == name]
        sizes = [row["parameters"][against] for row in series]
        left.loglog(sizes, [row["ms"] for row in series], marker="o", label=name)
        right.loglog(sizes, [row["peak_mib"] for row in series], marker="o", label=name)
    ticks = sorted({row["parameters"][against] for row in timed})
    left.set(ylabel=f"{y}, ms")
    right.set(ylabel="peak extra memory, MiB")
    for axes in (left, right):
        axes.set(xlabel=x, xticks=ticks, xticklabels=[f"{tick:,}" for tick in ticks])
        plain_ticks(axes.yaxis, *axes.get_ylim())
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_command(
    plot: Callable[[list[Row], Path], None], module: str, description: str | None
) -> None:
    """The command line of a module that makes one plot from a finished run."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("results", type=Path, help="losses.jsonl of a finished run")
    parser.add_argument("plot", type=Path, help="the PNG to write")
    options = parser.parse_args()
    plot(read_results(options.results)[1], options.plot)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, help="also plot the timing rows as bars into this PNG")
    options = parser.parse_args()
    files = [
        f
        for path in options.results
        for f in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
    ]
    timed: list[Row] = []
    for file in files:
        stamp, rows = read_results(file)
        accuracy = file.stem.startswith("accuracy")
        timed += [] if accuracy else rows
        print(f"## {file.stem}\n\n{accuracy_table(rows) if accuracy else timing_table(rows)}\n")
        print(f"{environment_line(stamp)}\n")
    if options.plot:
        plot_ratios(timed, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
