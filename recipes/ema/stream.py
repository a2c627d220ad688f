"""Batches of any size, from loaders that make batches of one."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.training.task import Shuffled


class Stream:
    """The examples of endless batches, one after the other: none is left out, whatever is taken at a time."""

    def __init__(self, batches: Iterator[Sequence[Tensor]]) -> None:
        self._batches = batches
        self._rest: list[Sequence[Tensor]] = []  # of the last batch

    def take(self, examples: int) -> tuple[Tensor, ...]:
        """The next `examples`, of each tensor of a batch."""
        parts, self._rest = self._rest, []
        held = sum(len(part[0]) for part in parts)
        while held < examples:
            parts.append(next(self._batches))
            held += len(parts[-1][0])
        joined = tuple(map(torch.cat, zip(*parts, strict=True)))
        if held > examples:
            self._rest = [[tensor[examples:].clone() for tensor in joined]]  # a view would hold all that was taken
        return tuple(tensor[:examples] for tensor in joined)


def shuffled(data: Dataset[Any], *, chunk: int, seed: int, start: int, workers: int) -> Stream:
    """Endless epochs of `data`, from the example after the first `start` on; loaded `chunk` at a time."""
    order = Shuffled(data, chunk, seed=seed, rank=0, ranks=1, start=start)
    return Stream(iter(DataLoader(data, batch_sampler=order, num_workers=workers)))
