"""What the commands print on: a terminal, a pipe or a file, of any encoding."""

import codecs
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich takes a third of the time of --help, which does not use it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

WIDE = 1000  # characters; lines of a pipe or a file are not wrapped
SPELLED = {"±": "+/-", "…": "...", "—": "-"}


def console() -> "Console":
    """Standard output; wrapped on a terminal alone."""
    from rich.console import Console

    found = Console(emoji=False)
    return found if found.is_terminal else Console(width=WIDE, emoji=False)


def echo(line: str, style: str | None = None) -> None:
    """Print one line as it is."""
    console().print(line, style=style, highlight=False, markup=False)


def new_table(*columns: str, title: str) -> "Table":
    """An empty table, to be filled by `add_row` and printed by `console().print`."""
    from rich.table import Table

    return Table(*columns, title=plain(title))


def plain(text: str) -> "Text":
    """`text` as it is: rich reads brackets in a string as markup."""
    from rich.text import Text

    return Text(text)


def accept_any_encoding() -> None:
    """Spell characters that an output's encoding lacks, such as ± in ASCII, instead of failing."""
    codecs.register_error("spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream that replaces them may not have it
            stream.reconfigure(errors="spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(SPELLED.get(c, "?") for c in characters), error.end
