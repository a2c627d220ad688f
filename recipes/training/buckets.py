"""Batches of neighbours in length, for tasks whose examples are sequences: endless, seeded, and elastic.

Every epoch is one fixed line of examples: shuffled, sorted by length inside of a pool, cut into blocks of one base
batch, the blocks shuffled. A micro-batch is a few blocks or an equal part of one, so neither its size nor the number of
ranks changes what comes when. Only a micro-batch of several blocks mixes lengths.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import Sampler

import anybatch
from recipes.training.loading import loader
from recipes.training.task import DataError, Task

POOL = 64  # blocks sorted together: more is less padding, fewer is more mixing


def bucketed(
    task: Task, units: Sequence[int], *, lengths: Sequence[int], micro_batch: int, workers: int, **place: int
) -> Iterator[Any]:
    """The micro-batches of a task's training set; `place` is seed, rank, ranks and start, as in `Bucketed`."""
    order = Bucketed(units, lengths=lengths, block=task.base_batch, micro_batch=micro_batch, **place)
    return iter(loader(task.train_set, order, workers=workers, collate=task.collate))


class Bucketed(Sampler[list[int]]):
    """The micro-batches of one rank, as lists of indices; the ranks take turns.

    In every epoch each example comes once. A micro-batch has `micro_batch` units, but for about one example and for
    what rounding the number of blocks in an epoch adds or takes.

    Args:
        units: of each example what the batch size counts: 1, or its target tokens.
        lengths: of each example, what it is sorted by.
        block: the base batch, in units.
        micro_batch: in units; a multiple of `block` or a divisor of it.
        start: where to go on: the number of micro-batches that all ranks together have used, times their size.

    Raises:
        DataError: there are no examples.
        anybatch.InvalidValueError: a `micro_batch` or a `start` that does not fit.
    """

    def __init__(
        self,
        units: Sequence[int],
        *,
        lengths: Sequence[int],
        block: int,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        start: int = 0,
    ) -> None:
        if not units:
            raise DataError("The training set is empty.")
        if micro_batch < 1 or (micro_batch % block and block % micro_batch):
            raise anybatch.InvalidValueError(
                f"micro_batch must be a multiple or a divisor of the base batch {block}, got {micro_batch}."
            )
        self.shares, self.blocks = max(1, block // micro_batch), max(1, micro_batch // block)
        if start % (block // self.shares):
            raise anybatch.InvalidValueError(
                f"start must be a multiple of {block // self.shares}, got {start}: choose a smaller micro_batch."
            )
        self.first = start * self.shares // block  # in shares of a block
        self.units, self.lengths, self.block = units, lengths, block
        self.seed, self.rank, self.ranks = seed, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        parts = self._parts()
        for number in count():
            chosen = [index for part in islice(parts, self.blocks) for index in part]
            if number % self.ranks == self.rank:
                yield chosen

    def _parts(self) -> Iterator[list[int]]:
        """The shares of the blocks, or the blocks, from the first one on."""
        number = blocks_in(self.units, block=self.block)
        skip = self.first % (number * self.shares)
        for epoch in count(self.first // (number * self.shares)):
            blocks = line(self.units, lengths=self.lengths, block=self.block, seed=self.seed, epoch=epoch)
            for block in blocks[skip // self.shares :]:
                yield from cut(block, self.units, parts=self.shares)[skip % self.shares :]
                skip = 0


def blocks_in(units: Sequence[int], *, block: int) -> int:
    """The number of blocks in an epoch."""
    return min(len(units), max(1, round(sum(units) / block)))


def line(units: Sequence[int], *, lengths: Sequence[int], block: int, seed: int, epoch: int) -> list[list[int]]:
    """The blocks of one epoch in their order: each index once, neighbours within a block of like length."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(units), generator=generator).tolist()
    number = blocks_in(units, block=block)
    pools = cut(shuffled, units, parts=max(1, round(number / POOL)))
    blocks: list[list[int]] = []
    for i, pool in enumerate(pools):
        share = number * (i + 1) // len(pools) - number * i // len(pools)
        blocks += cut(sorted(pool, key=lengths.__getitem__), units, parts=share)
    order = torch.randperm(len(blocks), generator=generator).tolist()
    return [blocks[i] for i in order]


def cut(indices: list[int], units: Sequence[int], *, parts: int) -> list[list[int]]:
    """`parts` stretches of about equal units, none of them empty.

    Raises:
        anybatch.InvalidValueError: there are fewer indices than parts.
    """
    n = len(indices)
    if n < parts:
        raise anybatch.InvalidValueError(f"{n} examples cannot be cut into {parts} micro-batches: choose larger ones.")
    total, position, last = sum(units[i] for i in indices), 0, -1
    stretches: list[list[int]] = [[] for _ in range(parts)]
    for k, index in enumerate(indices):
        # The share that the example begins in; but none is passed over, and one is left for each that is to come.
        last = min(max(position * parts // total, last, parts - (n - k)), last + 1)
        stretches[last].append(index)
        position += units[index]
    return stretches
