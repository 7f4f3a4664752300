"""Command-line parsing: a recipe and its knobs, or a command's arguments. Errors are one line."""

import argparse
import contextlib
import difflib
import io
import re
import sys
from dataclasses import fields
from itertools import dropwhile, takewhile
from typing import NoReturn

from fastssl.config import Config, flag, knob_names
from fastssl.recipes import RECIPES, find_recipe


class UsageError(ValueError):
    """The command line is invalid."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, in one line, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def recipe_first(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """(recipe, flags) of a command that takes a recipe."""
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"fastssl {command} needs a recipe first; there are {', '.join(RECIPES)}")
    return arguments[0], arguments[1:]


def parse_config(recipe: str, flags: list[str]) -> Config:
    """The recipe's Config with the flags applied, those of `Config` and of its method's knobs;
    UsageError, in one line, for an invalid flag or value."""
    import tyro

    from fastssl.objectives import complete

    default = find_recipe(recipe).config(method=_value_of("--method", flags))
    flags = _known_flags(default, flags)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = tyro.cli(
                Config,
                default=default,  # the type of its `objective` determines the knobs
                args=flags,
                prog=f"fastssl train {recipe}",
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        reason = re.sub(
            "^Error parsing (Config|objective): ", "", _first_paragraph(errors.getvalue())
        )
        raise UsageError(f"{reason}; see `fastssl train {recipe} --help`") from None
    try:
        return complete(config)
    except ValueError as error:
        raise UsageError(f"{error}; see `fastssl train {recipe} --help`") from None


def _value_of(name: str, flags: list[str]) -> str | None:
    """The last value of the flag `name`, given as `name VALUE` or `name=VALUE`."""
    found = None
    for position, given in enumerate(flags):
        if given == name and position + 1 < len(flags):
            found = flags[position + 1]
        elif given.startswith(f"{name}="):
            found = given.removeprefix(f"{name}=")
    return found


def _known_flags(config: Config, flags: list[str]) -> list[str]:
    """`flags` without those of other methods, which are ignored with a warning. UsageError for an
    unknown flag, and for --fused-head and --oracle where the method has none."""
    from fastssl.objectives import METHODS

    known = {*_switches(Config), *_switches(type(config.objective)), "--help", "-h"}
    of_methods = {name: _switches(method.Knobs) for name, method in METHODS.items()}
    foreign = {k: v for theirs in of_methods.values() for k, v in theirs.items() if k not in known}
    known_flags: list[str] = []
    words = iter(flags)
    for word in words:
        name = word.split("=", 1)[0].replace("_", "-")
        if name in ("--fused-head", "--oracle") and name in foreign:
            methods = ", ".join(m for m, theirs in of_methods.items() if name in theirs)
            raise UsageError(f"{name} is for {methods}: --method {config.method} has none")
        if name in foreign:
            print(f"warning: {config.method} has no {name}; it is ignored", file=sys.stderr)
            if not foreign[name] and "=" not in word:
                next(words, None)  # its value
            continue
        if word.startswith("--") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            lists = "; `fastssl train RECIPE --help` lists the knobs"
            raise UsageError(
                f"unknown knob {name}" + (f"; did you mean {close[0]}?" if close else lists)
            )
        known_flags.append(word)
    return known_flags


def _switches(cls: type) -> dict[str, bool]:
    """The flags of `Config` or of a method's knobs -> whether each is boolean, without a value."""
    knobs = {f.name: f.type is bool for f in fields(cls) if f.name in knob_names(cls)}
    switches = {flag(name): boolean for name, boolean in knobs.items()}
    return switches | {f"--no-{name[2:]}": boolean for name, boolean in switches.items()}


def _first_paragraph(error: str) -> str:
    """The text below the title of tyro's error, between two rules or in a box, as one line."""
    lines = [line.strip("│| ") for line in error.splitlines()[1:]]
    below = dropwhile(lambda line: not line.strip("─- "), lines)
    return " ".join(takewhile(lambda line: line.strip("─- "), below)) or "the flags cannot be read"
