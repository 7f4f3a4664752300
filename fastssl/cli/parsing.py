"""Reading a command line: a recipe and the knobs of Config, or a command's own arguments; every
mistake is one line."""

import argparse
import contextlib
import difflib
import io
from dataclasses import fields
from itertools import dropwhile, takewhile
from typing import NoReturn

from fastssl.config import Config
from fastssl.recipes import RECIPES, find_recipe


class UsageError(ValueError):
    """The command line asks for something that is not there."""


class Parser(argparse.ArgumentParser):
    """Its complaints are UsageErrors, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def recipe_first(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """(recipe, flags) of a command that takes a recipe."""
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"fastssl {command} needs a recipe first; there are {', '.join(RECIPES)}")
    return arguments[0], arguments[1:]


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
