"""Loops over data: passes until the run is done, and the parts of a batch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves

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


class Parts:
    """Pairs of a part of a batch and its share in the step's loss.

    Args:
        pieces: the parts.
        n: their number.
        batch_dim: the dimension that counts examples.
        share: the share of each.
        no_sync: a context for all but the last part.
        size: is called with the number of examples of each part before the loop gets it.
    """

    def __init__(
        self,
        pieces: Iterator[Any],
        n: int,
        *,
        batch_dim: int,
        share: float,
        no_sync: Callable[[], AbstractContextManager[None]],
        size: Callable[[int], None],
    ) -> None:
        self.n = n
        self.taken = 0
        self._pairs = self._iterate(pieces, batch_dim, share, no_sync, size)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        return self

    def __next__(self) -> tuple[Any, float]:
        return next(self._pairs)

    @property
    def left(self) -> bool:
        """Whether the loop has begun and not come to its last part."""
        return 0 < self.taken < self.n

    def _iterate(
        self,
        pieces: Iterator[Any],
        dim: int,
        share: float,
        no_sync: Callable[[], AbstractContextManager[None]],
        size: Callable[[int], None],
    ) -> Iterator[tuple[Any, float]]:
        for piece in pieces:
            self.taken += 1
            rows = next((t.shape[dim] for t in tree_leaves(piece) if isinstance(t, Tensor) and t.dim() > dim), None)
            if rows is not None:
                size(rows)
            with nullcontext() if self.taken == self.n else no_sync():
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
