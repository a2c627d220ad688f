"""A progress bar in tau."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        drawn = time.monotonic()

        def draw() -> None:
            bar.update(task, completed=clock.tau, description=values(), refresh=True)

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
