"""Commands on runs: train, eval, rank, select."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from fastssl.cli.parsing import Parser, UsageError, parse_config, recipe_first


def train(arguments: list[str]) -> None:
    recipe, flags = recipe_first("train", arguments)
    dry = "--dry-run" in flags
    config = parse_config(recipe, [flag for flag in flags if flag != "--dry-run"])
    from fastssl.pretrain import pretrain  # imports torch: only for a valid command line
    from fastssl.runtime import run_dir

    console = Console()

    def log(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    if dry:
        from fastssl.dry_run import dry_run

        log("\n".join(dry_run(config, log).lines()))
        return
    folder = Path(config.run) if config.run else run_dir.next_free(Path("runs"), recipe, config)
    summary = pretrain(config, folder, log)
    if not summary:  # not rank 0
        return
    evaluated = f"evaluated in {summary['evaluate_s']:.1f} s"
    if config.eval:
        _print_accuracy(console, summary["accuracy"], summary["rankme"])
    else:
        evaluated = f"not evaluated: `fastssl eval {folder}` does it"
    console.print(
        f"trained in {summary['train_s']:.1f} s ({summary['views_per_s']:,.0f} views/s), "
        f"{evaluated}; results in {folder}",
        highlight=False,
    )


def evaluate(arguments: list[str]) -> None:
    """`fastssl eval`: repeat a finished run's evaluation, or apply a paper's protocol."""
    if not arguments:
        raise UsageError("fastssl eval takes one run folder")
    from fastssl.evaluation.probes import PROBES
    from fastssl.evaluation.protocols import PROTOCOLS, evaluate_protocol, evaluate_run

    lines = "\n".join(f"  {name}: {protocol.source}" for name, protocol in PROTOCOLS.items())
    parser = Parser(
        prog="fastssl eval",
        description="Evaluate a finished run: repeat its evaluation, or, with any flag, apply a\n"
        "protocol, with 10 % and 1 % of the labels too. Protocols are not comparable. It\n"
        "resumes where it was interrupted.\n" + lines,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), help="default: neutral")
    parser.add_argument(
        "--probe", nargs="+", choices=tuple(PROBES), default=[], help="default: the protocol's"
    )
    parser.add_argument("--views", type=int, help="views to average; default: the protocol's")
    options = parser.parse_args(arguments)
    console = Console()
    if not (options.protocol or options.probe or options.views):
        table, rank = evaluate_run(options.run)
    else:
        name, probes, rank = options.protocol or "neutral", tuple(options.probe), None
        table = evaluate_protocol(options.run, name, print, probes=probes, views=options.views)
    if os.environ.get("RANK", "0") == "0":
        _print_accuracy(console, {row: _plain(cells) for row, cells in table.items()}, rank)


def rank(arguments: list[str]) -> None:
    """`fastssl rank`: spectral criteria of a finished run."""
    options = _quality_parser("rank", "run").parse_args(arguments)
    from fastssl.evaluation.model_selection import measure_quality

    quality = measure_quality(options.run, print, **_quality_options(options))
    table = RichTable("", *CRITERIA.values(), title=f"spectrum of {options.run}")
    for layer, criteria in quality.items():
        table.add_row(layer, *(f"{criteria[name]:.2f}" for name in CRITERIA))
    Console().print(table)


def select(arguments: list[str]) -> None:
    """`fastssl select`: rank runs of one method by each criterion."""
    parser = _quality_parser("select", "runs")
    parser.add_argument("--force", action="store_true", help="allow different methods or data")
    options = parser.parse_args(arguments)
    from fastssl.evaluation.model_selection import measure_quality, rank_runs, require_comparable

    folders = list(dict.fromkeys(options.runs))
    if len(folders) < 2:
        raise UsageError("fastssl select compares runs: pass two folders or more")
    if not options.force:
        require_comparable(folders)
    measured = [measure_quality(f, print, **_quality_options(options)) for f in folders]
    for layer in ("embeddings", "features"):
        rows = [(f, m[layer]) for f, m in zip(folders, measured, strict=True) if layer in m]
        table = RichTable("run", *CRITERIA.values(), title=f"by the spectrum of {layer}")
        order = {n: rank_runs([criteria[n] for _, criteria in rows], n) for n in CRITERIA}
        for i, (folder, criteria) in sorted(enumerate(rows), key=lambda r: order["rankme"][r[0]]):
            cells = (f"{criteria[name]:.2f}  #{order[name][i]}" for name in CRITERIA)
            table.add_row(str(folder), *cells)
        if rows:
            Console().print(table)


CRITERIA = {
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "effective_rank": "effective rank",
    "alpha_req": "alpha-ReQ (best: 1)",
}


def _quality_parser(command: str, what: str) -> Parser:
    from fastssl.evaluation.model_selection import CAVEAT, LIDAR_IMAGES, LIDAR_VIEWS, RANKME_SAMPLES

    parser = Parser(prog=f"fastssl {command}", description=CAVEAT)
    parser.add_argument(what, type=Path, nargs="+" if what == "runs" else None, help="run folder")
    for name, default, help_text in (
        ("samples", RANKME_SAMPLES, "images for RankMe, effective rank and alpha-ReQ, at most"),
        ("images", LIDAR_IMAGES, "images for LiDAR, at most"),
        ("views", LIDAR_VIEWS, "augmented views of each for LiDAR"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{help_text}; default {default}"
        )
    return parser


def _quality_options(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in ("samples", "images", "views")}


def _plain(cells: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {name: asdict(accuracy) for name, accuracy in cells.items()}


def _print_accuracy(
    console: Console, accuracy: dict[str, dict[str, dict[str, float]]], rank: float | None
) -> None:
    """Print the accuracy table: a row per probe and label count, a column per kind of features."""
    if not accuracy:
        console.print(
            "no accuracy, since the data has no labels of two classes or more, or no test part; "
            f"RankMe of the features {rank:.1f}",
            highlight=False,
        )
        return
    table = RichTable("probe", "labels per class", *accuracy, title="accuracy on held-out images")
    for name in next(iter(accuracy.values())):
        probe, labels = name.rsplit("_", 1)
        cells = [row[name] for row in accuracy.values()]
        spread = [f" ±{c['std']:.3f}" if labels != "all" else "" for c in cells]
        values = [f"{c['mean']:.3f}{s}" for c, s in zip(cells, spread, strict=True)]
        table.add_row(probe, labels, *values)
    console.print(table)
    if rank is not None:
        console.print(f"RankMe of the pretrained features {rank:.1f}", highlight=False)
