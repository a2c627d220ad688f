"""A probe takes the two squared norms of a window in one way; every kind of norm is one.

[Note: copies] A norm is summed over all ranks. Where n ranks hold the same part of a gradient, each of them adds 1/n of
its squared norm. n is a number for each parameter, and one for the micro-batch's gradient and one for `.grad`:

    DDP         1 and W        each rank has a micro-batch of its own; all hold the same mean
    FSDP2       1 and 1        the mean is sharded
    HSDP        1 and the number of replicas
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anybatch._gradients.window import Norms


@dataclass(frozen=True)
class Placement:
    """Where the gradients of one trained parameter are measured.

    Args:
        leaf: the tensor on which a micro-batch's gradient arrives.
        sample_copies: number of ranks on which the same part of the same micro-batch's gradient arrives.
        mean_copies: number of ranks that hold the same part of `.grad`.
    """

    leaf: Tensor
    sample_copies: int = 1
    mean_copies: int = 1


class Probe(ABC):
    """The norms of one window: opened, given every micro-batch's gradient and the mean, then read."""

    name: ClassVar[str]

    @property
    def size(self) -> int:
        """k, the number of parts that have a norm each."""
        return 1

    @abstractmethod
    def follow(self, parameters: Sequence[Tensor], places: Sequence[Placement]) -> None:
        """Measure these parameters as well, from the next window on; a probe holds none of them."""

    @abstractmethod
    def drop(self) -> None:
        """Drop all parameters."""

    @abstractmethod
    def open(self, *, sampled: bool) -> bool:
        """Begin a window and return whether this probe measures it; `sampled`: whether the averages will take it."""

    @abstractmethod
    def sample(self, row: int, index: int, parameter: Tensor, grad: Tensor) -> None:
        """Measure the gradient that `parameter`, number `index`, got from micro-batch `row`."""

    @abstractmethod
    def samples(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Measure all gradients of a window at once: one tensor `[n, *shape]` a parameter, not divided by n."""

    @abstractmethod
    def mean(self, parameters: Sequence[Tensor]) -> None:
        """Measure this rank's part of `.grad` as it is now."""

    @abstractmethod
    def forget_mean(self) -> None:
        """Another backward has changed `.grad`."""

    @abstractmethod
    def norms(self, fires: Sequence[int]) -> Norms | None:
        """The norms of parameters that got `fires` gradients each; `None` where they are not known."""


class Row:
    """One float64 number for each parameter, on the device of its gradients."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        sizes: dict[torch.device, int] = {}
        places = []
        for device in devices:
            places.append((device, sizes.get(device, 0)))
            sizes[device] = sizes.get(device, 0) + 1
        self._places = places
        self._rows = {device: torch.zeros(n, dtype=torch.float64, device=device) for device, n in sizes.items()}
        self.views = [self._rows[device][i] for device, i in places]

    def squares(self) -> Tensor:
        """The square of each number, in the parameters' order, on the first one's device."""
        if len(self._rows) == 1:
            return next(iter(self._rows.values())).square()
        first = self._places[0][0]
        moved = {device: row.square().to(first) for device, row in self._rows.items()}
        return torch.stack([moved[device][i] for device, i in self._places])


class Table:
    """The norms of a window by parameter: a row for each micro-batch, and one for the mean."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self.drop()

    def drop(self) -> None:
        """Drop all parameters."""
        self._devices: list[torch.device] = []
        self._copies: list[tuple[int, int]] = []
        self.follow([])

    def follow(self, places: Sequence[Placement]) -> None:
        """Add parameters."""
        self._devices.extend(place.leaf.device for place in places)
        self._copies.extend((place.sample_copies, place.mean_copies) for place in places)
        self._rows.clear()
        self._mean: Row | None = None
        self.clear()

    def clear(self) -> None:
        """Begin a window."""
        self._observed: Tensor | None = None
        self._mean_squares: Tensor | None = None

    def cell(self, row: int, index: int) -> Tensor:
        """Where the norm of what parameter `index` got from micro-batch `row` is written."""
        while row >= len(self._rows):
            self._rows.append(Row(self._devices))
        return self._rows[row].views[index]

    def observe(self, squares: Sequence[Tensor], n: int) -> None:
        """Take each parameter's sum over n gradients that were not divided by n, in place of the rows."""
        self._observed = torch.stack([square.to(squares[0].device) for square in squares]) / n**2

    def mean_cells(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Where the norms of `.grad` are written; `mean_written` squares them."""
        if self._mean is None:
            self._mean = Row([p.device for p in parameters])
        return self._mean.views

    def mean_written(self) -> None:
        """Square the norms of `.grad` that were written."""
        if self._mean is not None:
            self._mean_squares = self._mean.squares()

    def forget_mean(self) -> None:
        """The norms of `.grad` are out of date."""
        self._mean_squares = None

    def squares(self, fires: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """By parameter: the sum of the samples' squares, and the mean's square; each over its number of copies."""
        samples = self._observed
        if samples is None:
            samples = torch.stack([row.squares() for row in self._written(fires)]).sum(0)
        mean = self._mean_squares
        samples = _over(samples, [copies for copies, _ in self._copies])
        return samples, None if mean is None else _over(mean, [copies for _, copies in self._copies])

    def _written(self, fires: Sequence[int]) -> list[Row]:
        """The window's rows. A parameter that got no gradient from a micro-batch has 0 there."""
        rows = self._rows[: max(fires)]
        for index, count in enumerate(fires):
            for row in rows[count:]:
                row.views[index].zero_()
        return rows


def _over(squares: Tensor, copies: Sequence[int]) -> Tensor:
    if set(copies) == {1}:
        return squares
    return squares / torch.tensor(copies, dtype=torch.float64, device=squares.device)
