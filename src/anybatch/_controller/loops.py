"""Loops: what a training loop takes from a controller, beside the steps."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import InvalidValueError, UsageError
from anybatch._gradients import Reduction, divisor_of
from anybatch._scaling import Clock, split

Batch = TypeVar("Batch")


class Loops:
    """Epochs, passes over data and parts of a batch; `Controller` has it."""

    _ddp: DistributedDataParallel | None
    _reduction: Reduction
    _population: float | None

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the run is over."""

    @property
    @abstractmethod
    def clock(self) -> Clock:
        """The clock."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps that happened."""

    @property
    def epoch(self) -> int:
        """The epoch at hand, of the base batch's training: `floor(tau * base_batch / examples)`, from 0.

        Raises:
            UsageError: `attach` was not given `examples`.
        """
        if self._population is None:
            raise UsageError("An epoch has a length only where attach was given base_batch and examples=len(data).")
        return self.clock.count(self._population)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Go through `loader` again and again until the controller is done, and hand out its batches.

        A sampler, batch sampler or data set with `set_epoch` gets another number at each pass: that of the steps so
        far, so that a resumed run does not see the orders of its beginning again, and all ranks see the same.

        Args:
            loader: what is gone through, a DataLoader say.

        Raises:
            InvalidValueError: a pass has no batch.
            UsageError: there is no `total`.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            >>> controller = anybatch.attach(optimizer, model=model, base_batch=4, micro_batch=4, epochs=3, examples=32)
            >>> for x in controller.batches([torch.randn(8, 4) for _ in range(4)]):
            ...     for part, share in controller.parts(x, 2):
            ...         (model(part).square().mean() * share).backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            >>> 24 <= controller.tau < 26
            True
        """
        while not self.done:
            for each in _with_set_epoch(loader):
                each.set_epoch(self.steps)
            empty = True
            for batch in loader:
                empty = False
                yield batch
                if self.done:
                    return
            if empty:
                raise InvalidValueError("The loader has no batch: is drop_last=True set for less than one of data?")

    def parts(self, batch: Any, n: int) -> Iterator[tuple[Any, float]]:
        """The `n` equal micro-batches of `batch`, each with the share that its loss has in the step's.

        Under DDP all but the last are inside of `no_sync`. With several `batches` a step, multiply the share by one
        over their number.

        Args:
            batch: as for `anybatch.split`.
            n: number of parts, a divisor of every first dimension.

        Returns:
            An iterator over pairs `(part, share)`; the share is `1 / n`, or 1 with `reduction="sum"`, or one over the
            divisor that was given in its place.

        Raises:
            InvalidValueError: as for `anybatch.split`.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            >>> controller = anybatch.attach(optimizer, model=model, base_batch=4, micro_batch=4)
            >>> for part, share in controller.parts(torch.randn(16, 4), 4):
            ...     (model(part).square().mean() * share).backward()
            >>> optimizer.step()
            >>> controller.scale
            4.0
        """
        pieces = split(batch, n)
        share = 1 / divisor_of(self._reduction, n)
        return self._parts(pieces, n, share)

    def _parts(self, pieces: Iterator[Any], n: int, share: float) -> Iterator[tuple[Any, float]]:
        for i, piece in enumerate(pieces, 1):
            with nullcontext() if self._ddp is None or i == n else self._ddp.no_sync():
                yield piece, share


def _with_set_epoch(loader: Any) -> Iterator[Any]:
    """What of a loader shuffles by the number of the pass."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    seen: set[int] = set()
    for part in (*parts, getattr(loader, "dataset", None)):
        if callable(getattr(part, "set_epoch", None)) and id(part) not in seen:
            seen.add(id(part))
            yield part
