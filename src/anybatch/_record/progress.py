"""A progress bar in tau."""

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from anybatch._errors import UsageError
from anybatch._scaling import Clock

_SECONDS = 0.1  # between two updates; a step may take microseconds


@contextmanager
def progress_bar(clock: Clock, *, shown: bool, values: Callable[[], str], console: Any) -> Iterator[None]:
    """A bar that follows the clock inside of the context.

    The steps draw it, not a thread: a fork of the process could copy a thread's locks. Without a total the bar has no
    end. `values` returns the text beside the bar; `console` is of rich, or `None` for standard error.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        raise UsageError("The progress bar needs rich: pip install 'anybatch[cli]'") from None
    console = Console(stderr=True) if console is None else console
    if shown and console.is_jupyter:
        with _following(clock, _in_notebook(clock, values)):
            yield
        return
    if not (shown and console.is_terminal):
        yield
        return
    end = "" if clock.total is None else f"/{clock.total:g}"
    columns = (
        TextColumn("tau {task.completed:.0f}" + end),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()) as bar:
        # rich annotates int here, and float everywhere else.
        task = bar.add_task(values(), total=clock.total, completed=clock.tau)  # type: ignore[arg-type]

        def draw() -> None:
            bar.update(task, completed=clock.tau, description=values(), refresh=True)

        with _following(clock, draw):
            yield


@contextmanager
def _following(clock: Clock, draw: Callable[[], None]) -> Iterator[None]:
    """Call `draw` as the clock moves, at most ten times a second, at the run's end and at the end of the context."""
    drawn = time.monotonic()

    def follow(_: float) -> None:
        nonlocal drawn
        if time.monotonic() - drawn >= _SECONDS or (clock.total is not None and clock.done):
            draw()
            drawn = time.monotonic()

    unsubscribe = clock.subscribe(follow)
    try:
        yield
    finally:
        unsubscribe()
        draw()


def _in_notebook(clock: Clock, values: Callable[[], str]) -> Callable[[], None]:
    """Show a bar below the cell, and return the function that draws it anew; needs no widgets."""
    notebook: Any = importlib.import_module("IPython.display")  # every notebook has it
    end = "" if clock.total is None else f"/{clock.total:g}"
    began, first = time.monotonic(), clock.tau

    def picture() -> Any:
        total = clock.total
        left = ""
        if total is not None and clock.tau > first:
            seconds = (time.monotonic() - began) * max(total - clock.tau, 0.0) / (clock.tau - first)
            left = f"{seconds // 60:.0f}:{seconds % 60:02.0f} left, "
        bar = "" if total is None else f'<progress value="{min(clock.tau, total)}" max="{total}"></progress> '
        return notebook.HTML(f"<div>tau {clock.tau:.0f}{end} {bar}{left}{escape(values())}</div>")

    shown = notebook.display(picture(), display_id=True)
    return lambda: shown.update(picture())
