"""Commands that show what there is: recipes, methods, views."""

import inspect
import re

from rich.console import Console
from rich.markup import escape
from rich.table import Column
from rich.table import Table as RichTable

from fastssl import recipes as recipes_file
from fastssl.cli.parsing import UsageError, parse_config, recipe_first
from fastssl.config import method_defaults
from fastssl.methods import METHODS
from fastssl.recipes import RECIPES

SHEET_ROWS, SHEET_VIEWS = 4, 8  # of a contact sheet


def recipes(arguments: list[str]) -> None:
    table = RichTable(
        Column("recipe", no_wrap=True), "method", "data", "backbone", "views", "epochs"
    )
    for name, c in RECIPES.items():
        table.add_row(
            name, c.method, c.data or "--data PATH", c.backbone, str(c.views), str(c.epochs)
        )
    Console().print(table)


def methods(arguments: list[str]) -> None:
    """`fastssl methods`: each with paper, formula, defaults, and its recipes' measured cards."""
    console, card = Console(), recipe_cards()
    for name, method in METHODS.items():
        defaults = " ".join(
            f"{knob.replace('_', '-')}={'tuned' if value is None else value}"
            for knob, value in method_defaults(name).items()
        )
        cards = [f"{r}: {card[r]}" for r, c in RECIPES.items() if c.method == name]
        console.print(f"[bold]{name}[/bold]  {escape(method.paper)}", highlight=False)
        asked = [f"  asked for by {method.flags}"] if method.flags else []
        for line in (f"  L = {method.formula}", *asked, f"  defaults: {defaults}"):
            console.print(escape(line), highlight=False)
        for line in cards or ["no recipe"]:
            console.print(escape(f"  {line}"), highlight=False)


def recipe_cards() -> dict[str, str]:
    """What stands above each recipe in `recipes.py`: time and accuracy on what hardware, or that it
    is not measured yet. Recipes below one comment share it."""
    cards: dict[str, str] = {}
    comment: list[str] = []
    above = ""
    for line in inspect.getsource(recipes_file).splitlines():
        if line.startswith("    # "):
            comment.append(line.removeprefix("    # "))
        elif name := re.match(r' {4}"([^"]+)": ', line):
            above, comment = " ".join(comment) or above, []
            cards[name[1]] = above
    return cards


def views(arguments: list[str]) -> None:
    recipe, flags = recipe_first("views", arguments)
    out = "views.png"
    if "--out" in flags:
        at = flags.index("--out")
        if at + 1 == len(flags):
            raise UsageError("--out needs the name of a PNG file")
        out = flags[at + 1]
        del flags[at : at + 2]
    config = parse_config(recipe, flags)
    from fastssl.data.contact_sheet import draw_contact_sheet
    from fastssl.data.datasets import load_images
    from fastssl.data.loading import build_views

    size, oriented = config.load_size, config.oriented
    images = load_images(config.data, "train", size=size, holdout=config.holdout, oriented=oriented)
    chosen = images[:: max(1, len(images) // SHEET_ROWS)][:SHEET_ROWS]
    draw_contact_sheet(chosen, build_views(config)[:SHEET_VIEWS], config.seed, out)
    Console().print(f"{out}: {len(chosen)} images and their views", highlight=False)
