"""The flags of a run: those of `Config` under its headings, then those of its method's knobs.

Read from the dataclasses and their source, without torch, so that `--help` is quick.
"""

import ast
import linecache
import re
import sys
from argparse import SUPPRESS, BooleanOptionalAction, HelpFormatter
from dataclasses import Field, fields, is_dataclass, replace
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from fastssl.cli.parsing import Parser
from fastssl.config import Config, Knobs, flag, knob_names
from fastssl.knobs import KNOBS
from fastssl.recipes import Recipe

HELP_FORMAT = partial(HelpFormatter, max_help_position=26)


def knobs_class(method: str) -> type[Knobs]:
    """The knobs of a method by name; torch is imported for a method that `KNOBS` does not have."""
    if method in KNOBS:
        return KNOBS[method]
    from fastssl.objectives import method_class

    return method_class(method).Knobs


def unchecked_config(recipe: Recipe, method: str | None) -> Config:
    """The recipe's Config, or that of another method with its settings, without the checks that
    need torch."""
    method = method or recipe.settings.method
    knobs = knobs_class(method)
    own = {name: x for name, x in recipe.knobs.items() if name in knob_names(knobs)}
    return replace(recipe.settings, method=method, objective=knobs(**own))


def flag_parser(prog: str, config: Config, description: str = "") -> Parser:
    """Parses the flags that are given, by the names of the knobs; the defaults that its help shows
    are those of `config`."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--knob value ...]",
        description=description,
        formatter_class=HELP_FORMAT,
        argument_default=SUPPRESS,
        allow_abbrev=False,
    )
    headings, docs = knob_docs(Config)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(headings.values())}
    for field in fields(Config):
        if field.name in knob_names(Config):
            options = _options(field, docs[field.name], getattr(config, field.name))
            groups[headings[field.name]].add_argument(flag(field.name), **options)
    knobs = config.objective
    if fields(knobs):
        group = parser.add_argument_group(f"knobs of {config.method}")
        _, docs = knob_docs(type(knobs))
        for field in fields(knobs):
            options = _options(field, docs[field.name], getattr(knobs, field.name))
            group.add_argument(flag(field.name), **options)
    return parser


def knob_docs(cls: type) -> tuple[dict[str, str], dict[str, str]]:
    """(heading, docstring) of each field of a dataclass by name: the `# heading` comment above it
    and the string below it."""
    headings: dict[str, str] = {}
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        lines, classes = _parsed(str(sys.modules[base.__module__].__file__))
        body = classes[base.__name__].body
        heading, begin = "", classes[base.__name__].lineno
        for node, below in zip(body, [*body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            for line in lines[begin : node.lineno]:
                if comment := re.fullmatch(r" {4}# ([a-z ]+)\n?", line):
                    heading = comment[1]
            begin = node.lineno
            headings[node.target.id] = heading
            doc = below.value if isinstance(below, ast.Expr) else None
            text = doc.value if isinstance(doc, ast.Constant) else ""
            docs[node.target.id] = " ".join(str(text).split())
    return headings, docs


@cache
def _parsed(path: str) -> tuple[list[str], dict[str, ast.ClassDef]]:
    """(lines, classes by name) of a source file."""
    lines = linecache.getlines(path)
    tree = ast.parse("".join(lines))
    return lines, {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _options(field: Field[Any], doc: str, default: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a knob."""
    kind: Any = field.type
    if isinstance(kind, UnionType):  # X | None, where None stands for a default that is chosen
        (kind,) = set(get_args(kind)) - {NoneType}
    shown = "auto" if default is None else "none" if default == "" else default
    options: dict[str, Any] = {"help": f"{doc} (default: {shown})".replace("%", "%%")}
    if kind is bool:
        return options | {"action": BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind)}
    return options | {"type": kind, "metavar": kind.__name__.upper()}
