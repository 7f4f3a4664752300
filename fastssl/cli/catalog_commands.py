"""Commands that list recipes and methods, and plot views."""

from dataclasses import Field, fields
from typing import Any

from fastssl.cli.console import echo
from fastssl.cli.parsing import (
    Parser,
    UsageError,
    help_parser,
    parse_config,
    recipe_first,
    wants_help,
)
from fastssl.config import flag
from fastssl.recipes import RECIPES

SHEET_ROWS, SHEET_VIEWS = 4, 8  # of a contact sheet
RECIPES_HELP = "List the recipes: settings and measured accuracy, those for your own images first."
METHODS_HELP = "List the methods: paper, formula, default knobs, measured accuracy of recipes."
VIEWS_HELP = (
    "Plot images of a recipe's data and their views, with the sampled parameters, into the PNG "
    "that --out FILE names (default: views.png)."
)


def recipes(arguments: list[str]) -> None:
    """`fastssl recipes`: each with its settings and its card, those for one's own images first."""
    Parser(prog="fastssl recipes", description=RECIPES_HELP).parse_args(arguments)
    heading = ""
    for name, recipe in RECIPES.items():
        c = recipe.settings
        data = f"on {c.data}" if c.data else "for your own images: --data PATH"
        if data != heading:
            echo(data, style="bold")
            heading = data
        views = "1 view" if c.views == 1 else f"{c.views} views"
        epochs = "1 epoch" if c.epochs == 1 else f"{c.epochs} epochs"
        settings = f"{c.method}, {c.backbone}, {views} of {c.image_size} px, {epochs}"
        echo(f"  {name}", style="bold")
        echo(f"    {settings}\n    {recipe.card}")


def methods(arguments: list[str]) -> None:
    """`fastssl methods`: each with paper, formula, defaults, and its recipes' cards."""
    Parser(prog="fastssl methods", description=METHODS_HELP).parse_args(arguments)
    from fastssl.knobs import OracleKnobs
    from fastssl.objectives import METHODS
    from fastssl.objectives.pal import PAL

    oracle = {field.name for field in fields(OracleKnobs)}
    for name, method in METHODS.items():
        knobs = [field for field in fields(method.Knobs) if field.name not in oracle]
        _print_method(name, method.paper, method.formula, [], knobs)
        cards = [f"{r}: {x.card}" for r, x in RECIPES.items() if x.settings.method == name]
        _print_lines(cards or ["no recipe"])
    supported = [name for name, method in METHODS.items() if issubclass(method.Knobs, OracleKnobs)]
    usage = [f"usage: --method {'|'.join(supported)} --oracle labels|queries"]
    _print_method("pal", PAL.paper, PAL.formula, usage, list(fields(OracleKnobs)))


def _print_method(
    name: str, paper: str, formula: str, usage: list[str], knobs: list[Field[Any]]
) -> None:
    echo(f"{name}  {paper}", style="bold")
    defaults = " ".join(
        f"{flag(k.name)[2:]}={'tuned' if k.default is None else k.default}" for k in knobs
    )
    _print_lines([f"L = {formula}", *usage, f"defaults: {defaults}"])


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        echo(f"  {line}")


def views(arguments: list[str]) -> None:
    """`fastssl views`: a contact sheet."""
    if wants_help(arguments):
        help_parser("views", arguments, VIEWS_HELP).parse_args(["--help"])
    recipe, flags = recipe_first("views", arguments)
    out = "views.png"
    if "--out" in flags:
        position = flags.index("--out")
        if position + 1 == len(flags):
            raise UsageError("--out needs the name of a PNG file")
        out = flags[position + 1]
        del flags[position : position + 2]
    config = parse_config(recipe, flags)
    import torch

    from fastssl.data.contact_sheet import plot_contact_sheet
    from fastssl.data.loading import build_views
    from fastssl.data.splits import open_split

    split = open_split(config, "train")
    step = max(1, len(split) // SHEET_ROWS)
    chosen = torch.arange(0, len(split), step)[:SHEET_ROWS]
    images = [image for _, batch in split.batches([chosen]) for image in batch]
    shown = build_views(config)[:SHEET_VIEWS]
    plot_contact_sheet(images, shown, config.seed, out, config.policy)
    echo(f"{out}: {len(images)} images and their views")
