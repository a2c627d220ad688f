"""What the commands share: one clear line and exit code 2 for whatever a user can get wrong."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def words(text: str) -> list[str]:
    """The comma-separated words of an option, in lower case."""
    return [word.strip().lower() for word in text.split(",") if word.strip()]


def in_options(message: str, options: Mapping[str, str]) -> str:
    """The message with each argument of a function as the option that a user gave for it.

    Args:
        message: what the function says.
        options: the option for each argument. One that is a plain word is replaced at the message's start alone.
    """
    for name, option in options.items():
        start = "" if "_" in name else "^"
        message = re.sub(rf"{start}(?<![\w/.'\"-]){name}(?![\w/'\"-]|\.\w)", option, message)
    return message


def failed(message: str) -> typer.Exit:
    """To be raised: the message on standard error, exit code 2."""
    typer.echo(message, err=True)
    return typer.Exit(2)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> "Table":
    """A table with a line a row, narrow enough for 80 columns where that can be; `left` columns hold words."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right")
    for row in rows:
        made.add_row(*row)
    return made


def fits(made: "Table", console: "Console") -> bool:
    """Whether the terminal is wide enough for it."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=1000), made).maximum <= console.width
