"""Slots: where the norms of a window's micro-batches are written, so that no hook makes a tensor of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Slots:
    """One float64 number a parameter, where a backward's norms are written; one row a micro-batch of the window."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        sizes: dict[torch.device, int] = {}
        places = []
        for p in parameters:
            places.append((p.device, sizes.get(p.device, 0)))
            sizes[p.device] = sizes.get(p.device, 0) + 1
        self._places = places
        self._rows = {device: torch.zeros(n, dtype=torch.float64, device=device) for device, n in sizes.items()}
        self.views = [self._rows[device][i] for device, i in places]

    def total(self) -> Tensor:
        """Sum of the squares, on the first parameter's device."""
        sums = [row.square().sum() for row in self._rows.values()]
        return torch.stack([s.to(sums[0].device) for s in sums]).sum()

    def squares(self) -> Tensor:
        """The square of each number, in the parameters' order, on the first one's device."""
        if len(self._rows) == 1:
            return next(iter(self._rows.values())).square()
        first = self._places[0][0]
        moved = {device: row.square().to(first) for device, row in self._rows.items()}
        return torch.stack([moved[device][i] for device, i in self._places])


class Rows:
    """Slots for each micro-batch of a window, as many as the longest window so far has had.

    Args:
        leaves: the tensors on which the parameters' gradients arrive.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self._rows: list[Slots] = []

    def view(self, row: int, index: int) -> Tensor:
        """Where the norm of what parameter `index` got from micro-batch `row` is written."""
        while row >= len(self._rows):
            self._rows.append(Slots(self._leaves))
        return self._rows[row].views[index]

    def written(self, fires: Sequence[int]) -> list[Slots]:
        """The window's, of parameters that got `fires` gradients each; what they did not get is 0."""
        rows = self._rows[: max(fires)]
        for index, count in enumerate(fires):
            for slots in rows[count:]:  # unused in a micro-batch: its gradient there is zero
                slots.views[index].zero_()
        return rows
