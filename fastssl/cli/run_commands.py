"""Commands on runs: train, eval, rank, select."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastssl.cli.console import console, echo, new_table, plain
from fastssl.cli.parsing import (
    Parser,
    UsageError,
    help_parser,
    parse_config,
    recipe_first,
    value_of,
    wants_help,
    without,
)
from fastssl.config import Config
from fastssl.evaluation.defaults import (
    CAVEAT,
    LIDAR_IMAGES,
    LIDAR_VIEWS,
    PROBE_NAMES,
    PROTOCOL_SOURCES,
    RANKME_SAMPLES,
)

TRAIN_HELP = (
    "Pretrain a vision backbone without labels, then evaluate its features. With --dry-run: print "
    "parameters, memory, steps and the batch size that fits, and write nothing; with --measure as "
    "well: their time, by a few real steps."
)


def train(arguments: list[str]) -> None:
    """`fastssl train`: pretrain and evaluate, or with --dry-run estimate."""
    if wants_help(arguments):
        help_parser("train", arguments, TRAIN_HELP).parse_args(["--help"])
    recipe, flags = recipe_first("train", arguments)
    options = {flag for flag in flags if flag in ("--dry-run", "--measure")}
    if options == {"--measure"}:
        raise UsageError("--measure needs --dry-run")
    config = _train_config(recipe, [flag for flag in flags if flag not in options])
    if options:
        _print_dry_run(config, measure="--measure" in options)
        return
    from fastssl.pretrain import pretrain  # imports torch: only for a valid command line
    from fastssl.runtime import run_dir

    folder = Path(config.run) if config.run else run_dir.next_free(Path("runs"), recipe, config)
    summary = pretrain(config, folder, echo)
    if not summary:  # not rank 0
        return
    evaluated = f"evaluated in {summary['evaluate_s']:.1f} s"
    if config.eval:
        _print_accuracy(summary["accuracy"], summary["rankme"])
    else:
        evaluated = f"not evaluated: `fastssl eval {folder}` does it"
    if summary["probes"]:
        best = max(summary["probes"], key=lambda probe: probe["knn"])
        last = summary["probes"][-1]
        echo(
            f"online kNN {last['knn']:.3f} at step {last['step']}; "
            f"best {best['knn']:.3f} at step {best['step']}"
        )
    echo(
        f"trained in {summary['train_s']:.1f} s ({summary['views_per_s']:,.0f} views/s), "
        f"{evaluated}; results in {folder}"
    )


def _train_config(recipe: str, flags: list[str]) -> Config:
    """The Config of a run, its batch size, precision and compilation resolved for this machine.

    A run that is resumed keeps the batch size that --batch-size auto found for it.
    """
    automatic = value_of("--batch-size", flags) == "auto"
    if automatic:
        flags = without("--batch-size", flags)
    config = parse_config(recipe, flags)
    from fastssl.device import resolved

    config = resolved(config)
    if not automatic:
        return config
    from fastssl.distributed import is_launched
    from fastssl.dry_run import auto_batch_size
    from fastssl.runtime.run_dir import read_config

    if is_launched():
        raise UsageError("--batch-size auto is for one process; pass --global-batch")
    if (Path(config.run) / "config.json").is_file():
        return replace(config, batch_size=read_config(Path(config.run)).batch_size)
    size = auto_batch_size(config)
    echo(f"--batch-size auto: {size}; --lr {config.lr:g} is not scaled with it")
    return replace(config, batch_size=size)


def _print_dry_run(config: Config, *, measure: bool) -> None:
    from fastssl.dry_run import dry_run, measure_step_s

    found = dry_run(config)
    lines = found.lines()
    if measure:
        step_s = measure_step_s(config, echo)
        lines[-1] = f"{found.steps:,} steps of {1e3 * step_s:,.1f} ms: "
        lines[-1] += f"about {found.steps * step_s:,.0f} s"
    echo("\n".join(lines))


def evaluate(arguments: list[str]) -> None:
    """`fastssl eval`: repeat a finished run's evaluation, or apply a paper's protocol."""
    if not arguments:
        raise UsageError("fastssl eval takes one run folder")
    lines = "\n".join(f"  {name}: {source}" for name, source in PROTOCOL_SOURCES.items())
    parser = Parser(
        prog="fastssl eval",
        description="Evaluate a finished run: repeat its evaluation, or, with any flag, apply a\n"
        "protocol, with 10 % and 1 % of the labels too. Protocols are not comparable. It\n"
        "resumes where it was interrupted.\n" + lines,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--protocol", choices=tuple(PROTOCOL_SOURCES), help="default: neutral")
    parser.add_argument(
        "--probe", nargs="+", choices=PROBE_NAMES, default=[], help="default: the protocol's"
    )
    parser.add_argument("--views", type=int, help="views to average; default: the protocol's")
    options = parser.parse_args(arguments)
    from fastssl.evaluation.protocols import evaluate_protocol, evaluate_run

    if not (options.protocol or options.probe or options.views):
        table, rank = evaluate_run(options.run)
    else:
        name, probes, rank = options.protocol or "neutral", tuple(options.probe), None
        table = evaluate_protocol(options.run, name, echo, probes=probes, views=options.views)
    if os.environ.get("RANK", "0") == "0":
        _print_accuracy({row: _plain(cells) for row, cells in table.items()}, rank)


def rank(arguments: list[str]) -> None:
    """`fastssl rank`: spectral criteria of a finished run."""
    options = _quality_parser("rank", "run").parse_args(arguments)
    from fastssl.evaluation.model_selection import measure_quality

    quality = measure_quality(options.run, echo, **_quality_options(options))
    table = new_table("", *CRITERIA.values(), title=f"spectrum of {options.run}")
    for layer, criteria in quality.items():
        table.add_row(layer, *(f"{criteria[name]:.2f}" for name in CRITERIA))
    console().print(table)


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
    measured = [measure_quality(f, echo, **_quality_options(options)) for f in folders]
    for layer in ("embeddings", "features"):
        rows = [(f, m[layer]) for f, m in zip(folders, measured, strict=True) if layer in m]
        table = new_table("run", *CRITERIA.values(), title=f"by the spectrum of {layer}")
        order = {n: rank_runs([criteria[n] for _, criteria in rows], n) for n in CRITERIA}
        for i, (folder, criteria) in sorted(enumerate(rows), key=lambda r: order["rankme"][r[0]]):
            cells = (f"{criteria[name]:.2f}  #{order[name][i]}" for name in CRITERIA)
            table.add_row(plain(str(folder)), *cells)
        if rows:
            console().print(table)


CRITERIA = {
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "effective_rank": "effective rank",
    "alpha_req": "alpha-ReQ (best: 1)",
}


def _quality_parser(command: str, what: str) -> Parser:
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


def _print_accuracy(accuracy: dict[str, dict[str, dict[str, float]]], rank: float | None) -> None:
    """Print the accuracy table: a row per probe and label count, a column per kind of features."""
    if not accuracy:
        echo(
            "no accuracy, since the data has no labels of two classes or more, or no test part; "
            f"RankMe of the features {rank:.1f}"
        )
        return
    table = new_table("probe", "labels per class", *accuracy, title="accuracy on held-out images")
    for name in next(iter(accuracy.values())):
        probe, labels = name.rsplit("_", 1)
        cells = [row[name] for row in accuracy.values()]
        spread = [f" ±{c['std']:.3f}" if labels != "all" else "" for c in cells]
        values = [f"{c['mean']:.3f}{s}" for c, s in zip(cells, spread, strict=True)]
        table.add_row(probe, labels, *values)
    console().print(table)
    if rank is not None:
        echo(f"RankMe of the pretrained features {rank:.1f}")
