"""Command-line parsing: a recipe and its knobs, or a command's arguments. Errors are one line."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import NoReturn, get_args

from fastssl.config import Config, flag, knob_names, suggestion
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
    find_recipe(arguments[0])
    return arguments[0], arguments[1:]


def wants_help(arguments: Iterable[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def help_parser(command: str, arguments: list[str], description: str) -> Parser:
    """The parser whose help lists the flags of the recipe that `arguments` begin with, and of its
    method; without a recipe, the recipes and the common flags."""
    from fastssl.cli.knob_flags import flag_parser, unchecked_config

    if arguments[0].startswith("-"):
        recipes = f"RECIPE is one of {', '.join(RECIPES)}. With it, --help also lists its defaults "
        text = f"{description} {recipes}and the knobs of its method."
        return flag_parser(f"fastssl {command} RECIPE", Config(), text)
    recipe = find_recipe(arguments[0])
    config = unchecked_config(recipe, value_of("--method", arguments))
    return flag_parser(f"fastssl {command} {arguments[0]}", config, description)


def parse_config(recipe: str, flags: list[str]) -> Config:
    """The recipe's Config with the flags applied, those of `Config` and of its method's knobs;
    UsageError, in one line, for an invalid flag or value."""
    from fastssl.cli.knob_flags import flag_parser
    from fastssl.objectives import configured

    prog = f"fastssl train {recipe}"
    default = find_recipe(recipe).config(method=value_of("--method", flags))
    given = flag_parser(prog, default).parse_args(_known_flags(default, flags))
    try:
        return configured(default, **vars(given))
    except ValueError as error:
        raise UsageError(f"{error}; see `{prog} --help`") from None


def value_of(name: str, flags: list[str]) -> str | None:
    """The last value of the flag `name`, given as `name VALUE` or `name=VALUE`."""
    found = None
    for position, given in enumerate(flags):
        if given == name and position + 1 < len(flags):
            found = flags[position + 1]
        elif given.startswith(f"{name}="):
            found = given.removeprefix(f"{name}=")
    return found


def without(name: str, flags: list[str]) -> list[str]:
    """`flags` without the flag `name` and its value."""
    found, words = [], iter(flags)
    for word in words:
        if word == name:
            next(words, None)
        elif not word.startswith(f"{name}="):
            found.append(word)
    return found


def _known_flags(config: Config, flags: list[str]) -> list[str]:
    """`flags`, with dashes for underscores, without those of other methods, which are ignored with
    a warning. UsageError for an unknown flag, and for --fused-head and --oracle where the method
    has none."""
    from fastssl.objectives import METHODS

    known = {*_switches(Config), *_switches(type(config.objective))}
    of_methods = {name: _switches(method.Knobs) for name, method in METHODS.items()}
    foreign = {k: v for theirs in of_methods.values() for k, v in theirs.items() if k not in known}
    known_flags: list[str] = []
    words = iter(flags)
    for word in words:
        name, *value = word.split("=", 1)
        name = name.replace("_", "-")
        if name in ("--fused-head", "--oracle") and name in foreign:
            methods = ", ".join(m for m, theirs in of_methods.items() if name in theirs)
            raise UsageError(f"{name} is for {methods}: --method {config.method} has none")
        if name in foreign:
            print(f"warning: {config.method} has no {name}; it is ignored", file=sys.stderr)
            if not foreign[name] and not value:
                next(words, None)  # its value
            continue
        if word.startswith("--") and name not in known:
            lists = "`fastssl train RECIPE --help` lists the knobs"
            raise UsageError(f"unknown knob {name}; {suggestion(name, known, lists)}")
        known_flags.append("=".join([name, *value]) if word.startswith("--") else word)
    return known_flags


def _switches(cls: type) -> dict[str, bool]:
    """The flags of `Config` or of a method's knobs -> whether each is boolean, without a value."""
    knobs = {f.name: bool in (f.type, *get_args(f.type)) for f in fields(cls)}
    switches = {flag(name): boolean for name, boolean in knobs.items() if name in knob_names(cls)}
    return switches | {f"--no-{name[2:]}": True for name, boolean in switches.items() if boolean}
