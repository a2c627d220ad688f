"""Loops over data: passes until the run is done, and the parts of a batch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from anybatch._errors import InvalidValueError

Batch = TypeVar("Batch")


def passes(loader: Iterable[Batch], *, done: Callable[[], bool], steps: Callable[[], int]) -> Iterator[Batch]:
    """Iterate over `loader` again and again until the run is done.

    Args:
        loader: the batches.
        done: whether the run is done.
        steps: the number of steps so far, which `set_epoch` gets.

    Raises:
        InvalidValueError: a pass has no batch.
    """
    while not done():
        for each in _with_set_epoch(loader):
            each.set_epoch(steps())
        empty = True
        for batch in loader:
            empty = False
            yield batch
            if done():
                return
        if empty:
            raise InvalidValueError(
                "The loader has no batch: pass one with data; with drop_last=True it needs a whole batch."
            )


def shares(
    pieces: Iterator[Any], n: int, *, share: float, no_sync: Callable[[], AbstractContextManager[None]]
) -> Iterator[tuple[Any, float]]:
    """Pairs of a part and its share in the step's loss; all but the last part are in a `no_sync()` context."""
    for i, piece in enumerate(pieces, 1):
        with nullcontext() if i == n else no_sync():
            yield piece, share


def _with_set_epoch(loader: Any) -> Iterator[Any]:
    """The parts of a loader with `set_epoch`."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    seen: set[int] = set()
    for part in (*parts, getattr(loader, "dataset", None)):
        if callable(getattr(part, "set_epoch", None)) and id(part) not in seen:
            seen.add(id(part))
            yield part
