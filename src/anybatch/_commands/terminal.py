"""Shared parts of the commands: options, tables, and errors as one line with exit code 2."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def words(text: str) -> list[str]:
    """The comma-separated words of an option, in lower case."""
    return [word.strip().lower() for word in text.split(",") if word.strip()]


def in_options(message: str, options: Mapping[str, str]) -> str:
    """The message with the names of arguments replaced by options; plain words only at the message's start."""
    for name, option in options.items():
        start = "" if "_" in name else "^"
        message = re.sub(rf"{start}(?<![\w/.'\"-]){name}(?![\w/'\"-]|\.\w)", option, message)
    return message


def failed(message: str) -> typer.Exit:
    """Print the message on standard error; returns the exit to be raised, with code 2."""
    typer.echo(message, err=True)
    return typer.Exit(2)


def draw(plot: Callable[[Any, Path], object], found: Any, path: Path, *, option: str) -> None:
    """Call `plot(found, path)`; an error becomes one line that names the option."""
    try:
        plot(found, path)
    except ImportError as error:
        raise failed(f"{option} needs {error.name}: pip install 'anybatch[report]'") from None
    except (OSError, ValueError) as error:  # a missing folder, or a format that matplotlib does not have
        raise failed(f"{option}: cannot write {path}: {error}") from None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> "Table":
    """A table with small margins; the first `left` columns are aligned to the left."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right")
    for row in rows:
        made.add_row(*row)
    return made


def fits(made: "Table", console: "Console") -> bool:
    """Whether the terminal is wide enough for the table."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=1000), made).maximum <= console.width
