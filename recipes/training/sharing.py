"""An evaluation that the ranks share: each example counts once, on one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One rank's part of an evaluation; by default all of it."""

    rank: int = 0
    ranks: int = 1

    def of(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's parts, and whether each counts.

        Every rank gets equally many, since under FSDP2 all have to call the model together: where the parts do not
        divide, some are given the first one once more, and it does not count.
        """
        rounds = -(-len(parts) // self.ranks)
        chosen = [self.rank + i * self.ranks for i in range(rounds)]
        return [(parts[i], True) if i < len(parts) else (parts[0], False) for i in chosen]

    def summed(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over the ranks."""
        if self.ranks > 1:
            dist.all_reduce(numbers)
        return numbers

    def gathered(self, items: list[tuple[int, Any]]) -> list[Any]:
        """What all ranks have, in the order of the numbers that it comes with."""
        lists: list[Any] = [items]
        if self.ranks > 1:
            lists = [None] * self.ranks
            dist.all_gather_object(lists, items)
        return [item for _, item in sorted((pair for some in lists for pair in some), key=lambda pair: pair[0])]


ALONE = Share()
