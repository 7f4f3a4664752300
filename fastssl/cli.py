"""The commands: train, eval, recipes, convert, doctor. Flags derive from Config; mistakes end in
one line and exit code 2."""

import argparse
import contextlib
import difflib
import io
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress
from rich.table import Table as RichTable

from fastssl import run_folder
from fastssl.config import Config
from fastssl.recipes import RECIPES, find_recipe
from fastssl.signals import Interrupted, stop_signals

USAGE = """usage: fastssl COMMAND ...

  fastssl train RECIPE [--data PATH] [--run DIR] [--knob value ...]
                                   pretrain, evaluate, print the table
  fastssl train RECIPE --help      every knob, with the recipe's value
  fastssl eval RUN                 repeat a run's evaluation from its folder
  fastssl views RECIPE [--data PATH] [--out FILE.png] [--knob value ...]
                                   draw images, their views and what was drawn for each
  fastssl recipes                  list the recipes
  fastssl convert SOURCE TARGET [--size S] [--quality Q] [--workers N]
                                   images to .npy, .beton or tar shards; goes on where it stopped
  fastssl doctor --data PATH [--workers N]
                                   decode every image and say what training would meet
"""


SHEET_ROWS, SHEET_VIEWS = 4, 8  # of a contact sheet


class UsageError(ValueError):
    """The command line asks for something that is not there."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `fastssl` command."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Carry out one command line and return its exit code: 0, or 2 after one line that says what to
    change."""
    commands = {
        "train": _train,
        "eval": _eval,
        "views": _views,
        "recipes": _recipes,
        "convert": _convert,
        "doctor": _doctor,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise UsageError(f"unknown command {arguments[0]!r}; there are {', '.join(commands)}")
        with stop_signals():
            commands[arguments[0]](arguments[1:])
    except Interrupted as stop:
        print(f"fastssl: {stop}; the same command resumes the run", file=sys.stderr)
        return stop.exit_code
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"fastssl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _recipe_first(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """(recipe, flags) of a command that takes a recipe."""
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"fastssl {command} needs a recipe first; there are {', '.join(RECIPES)}")
    return arguments[0], arguments[1:]


def _train(arguments: list[str]) -> None:
    recipe, flags = _recipe_first("train", arguments)
    config = parse_config(recipe, flags)
    from fastssl.pretrain import pretrain  # torch and all: only once the command line is right

    folder = Path(config.run) if config.run else run_folder.next_free(Path("runs"), recipe, config)
    console = Console()
    summary = pretrain(config, folder, lambda line: console.print(line, highlight=False))
    print_accuracy(console, summary["accuracy"], summary["rankme"])
    console.print(
        f"trained in {summary['train_s']:.1f} s ({summary['views_per_s']:,.0f} views/s), "
        f"evaluated in {summary['evaluate_s']:.1f} s; everything is in {folder}",
        highlight=False,
    )


def _eval(arguments: list[str]) -> None:
    from dataclasses import asdict

    from fastssl.pretrain import evaluate_folder

    if len(arguments) != 1:
        raise UsageError("fastssl eval takes one run folder")
    table, rank = evaluate_folder(Path(arguments[0]))
    cells = {
        row: {name: asdict(accuracy) for name, accuracy in row_cells.items()}
        for row, row_cells in table.items()
    }
    print_accuracy(Console(), cells, rank)


def _views(arguments: list[str]) -> None:
    recipe, flags = _recipe_first("views", arguments)
    out = "views.png"
    if "--out" in flags:
        at = flags.index("--out")
        if at + 1 == len(flags):
            raise UsageError("--out needs the name of a PNG file")
        out = flags[at + 1]
        del flags[at : at + 2]
    config = parse_config(recipe, flags)
    from fastssl.contact_sheet import draw_contact_sheet
    from fastssl.data import load_images
    from fastssl.pretrain import build_views

    images = load_images(config.data, "train", size=config.load_size, holdout=config.holdout)
    chosen = images[:: max(1, len(images) // SHEET_ROWS)][:SHEET_ROWS]
    draw_contact_sheet(chosen, build_views(config)[:SHEET_VIEWS], config.seed, out)
    Console().print(f"{out}: {len(chosen)} images and their views", highlight=False)


def _recipes(arguments: list[str]) -> None:
    table = RichTable("recipe", "method", "data", "backbone", "views", "epochs")
    for name, c in RECIPES.items():
        table.add_row(
            name, c.method, c.data or "--data PATH", c.backbone, str(c.views), str(c.epochs)
        )
    Console().print(table)


def _convert(arguments: list[str]) -> None:
    parser = _Parser(prog="fastssl convert", description="Write images in an engine's format.")
    parser.add_argument("source", help="folder of images, .tar or folder of .tar, .npz")
    parser.add_argument("target", help="NAME.npy, NAME.beton, or NAME for a folder of tar shards")
    parser.add_argument("--size", type=int, help="px; the shorter side is reduced to it")
    parser.add_argument("--quality", type=int, default=90, help="of JPEGs that must be encoded")
    parser.add_argument("--workers", type=int, help="threads; one per core by default")
    parser.add_argument("--on-corrupt", choices=("skip", "stop"), default="skip")
    parser.add_argument("--quota", type=float, default=0.01, help="share that may be unreadable")
    options = vars(parser.parse_args(arguments))
    from fastssl_pipelines.convert import convert

    with Progress(transient=True) as bar:
        report = convert(progress=_progress(bar, "converting"), **options)
    for name, reason in report.skipped.items():
        print(f"left out: {name}: {reason}")
    print(f"{report.written} images in {report.target}, {len(report.skipped)} left out")


def _doctor(arguments: list[str]) -> None:
    parser = _Parser(prog="fastssl doctor", description="Decode every image; say what is met.")
    parser.add_argument("--data", required=True, help="folder of images, .tar shards, or .beton")
    parser.add_argument("--workers", type=int, help="threads; one per core by default")
    options = parser.parse_args(arguments)
    from fastssl_pipelines.doctor import diagnose

    with Progress(transient=True) as bar:
        found = diagnose(options.data, workers=options.workers, progress=_progress(bar, "reading"))
    print("\n".join(found.lines()))


class _Parser(argparse.ArgumentParser):
    """Its complaints are UsageErrors, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _progress(bar: Progress, what: str) -> Callable[[int, int], None]:
    task = bar.add_task(what, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def parse_config(recipe: str, flags: list[str]) -> Config:
    """The recipe's Config with the flags applied; UsageError in one line for a flag or value that
    is wrong."""
    import tyro

    default = find_recipe(recipe)
    known = {f"--{field.name.replace('_', '-')}" for field in fields(Config)}
    known |= {f"--no-{name[2:]}" for name in known} | {"--help", "-h"}
    for flag in flags:
        name = flag.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"; did you mean {close[0]}?"
                if close
                else f"; `fastssl train {recipe} --help` lists the knobs"
            )
            raise UsageError(f"unknown knob {name}{hint}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Config, default=default, args=flags, prog=f"fastssl train {recipe}")
    except SystemExit as stop:
        if not stop.code:
            raise
        reason = _first_paragraph(complaint.getvalue()).removeprefix("Error parsing Config: ")
        raise UsageError(f"{reason}; see `fastssl train {recipe} --help`") from None


def _first_paragraph(complaint: str) -> str:
    """What tyro says below its title, between two rules or in a drawn box, as one line."""
    lines = [line.strip("│| ") for line in complaint.splitlines()[1:]]
    below = dropwhile(lambda line: not line.strip("─- "), lines)
    return " ".join(takewhile(lambda line: line.strip("─- "), below)) or "the flags cannot be read"


def print_accuracy(
    console: Console, accuracy: dict[str, dict[str, dict[str, float]]], rank: float
) -> None:
    """The accuracy table: probe and labels per class down, kinds of features across."""
    if not accuracy:
        console.print(
            f"the data has no labels, so no accuracy; RankMe of the features {rank:.1f}",
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
    console.print(f"RankMe of the pretrained features {rank:.1f}", highlight=False)
