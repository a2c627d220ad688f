"""A probe takes the two squared norms of a window; each kind of norm has one.

[Note: copies] A norm is summed over all ranks. Where n ranks hold the same part of a gradient, each of them adds 1/n of
its squared norm. Each parameter has an n for the micro-batch's gradient and an n for `.grad`:

    DDP         1 and W        Each rank has a micro-batch of its own; all hold the same mean.
    FSDP2       1 and 1        The mean is sharded.
    HSDP        1 and the number of replicas
    experts     infinite       Their gradients are no micro-batch's: they have no part of the norms.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from anybatch._gradients.norms import part_of
from anybatch._gradients.window import Norms


@dataclass(frozen=True)
class Placement:
    """Where the gradients of one trained parameter are measured."""

    leaf: Tensor  # gets the gradient of a micro-batch
    sample_copies: float = 1  # number of ranks that get the same part of one micro-batch's gradient
    mean_copies: float = 1  # number of ranks that hold the same part of `.grad`

    @classmethod
    def unmeasured(cls, leaf: Tensor) -> "Placement":
        """The place of a gradient without a part of the norms. It is read all the same: nan skips the step."""
        return cls(leaf, inf, inf)

    @property
    def measured(self) -> bool:
        """Whether the gradient has a part of the norms."""
        return self.sample_copies < inf


class Probe(ABC):
    """The norms of one window.

    `open`, then for each micro-batch `sample` for each gradient and `measure`, then `mean` and `norms`.
    """

    name: ClassVar[str]

    @property
    def size(self) -> int:
        """The number k of parts with a norm each."""
        return 1

    @abstractmethod
    def follow(self, parameters: Sequence[Tensor], places: Sequence[Placement]) -> None:
        """Measure these parameters as well, from the next window on; keep no reference to them."""

    @abstractmethod
    def drop(self) -> None:
        """Drop all parameters."""

    @abstractmethod
    def open(self, *, sampled: bool) -> bool:
        """Begin a window and return whether this probe measures it; `sampled`: whether the averages take it."""

    @abstractmethod
    def sample(self, row: int, index: int, parameter: Tensor, grad: Tensor, *, held: bool) -> None:
        """Measure the gradient that `parameter`, number `index`, got from micro-batch `row`.

        One that is `held` is in the Euclidean queue as well, and may be measured in `measure`.
        """

    @abstractmethod
    def measure(self) -> None:
        """Measure the gradients that are held, at the end of a backward."""

    @abstractmethod
    def samples(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Measure all gradients of a window at once: one tensor `[n, *shape]` a parameter, not divided by n."""

    @abstractmethod
    def mean(self, parameters: Sequence[Tensor]) -> None:
        """Measure this rank's part of `.grad` as it is now."""

    @abstractmethod
    def forget_mean(self) -> None:
        """Drop the norms of `.grad`: another backward has changed it."""

    @abstractmethod
    def norms(self, fires: Sequence[int]) -> Norms | None:
        """The norms, where the parameters got `fires` gradients each; `None` where they are unknown."""


class OnDevices:
    """A list of numbers as a tensor; a copy to a device synchronises, so there is one for each."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self.numbers = numbers
        self._tensors: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on this device."""
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self.numbers, device=device)
        return self._tensors[device]


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
        """The square of each number, in the parameters' order, on the first parameter's device."""
        if len(self._rows) == 1:
            return next(iter(self._rows.values())).square()
        first = self._places[0][0]
        moved = {device: row.square().to(first) for device, row in self._rows.items()}
        return torch.stack([moved[device][i] for device, i in self._places])


class Table:
    """The norms of a window by parameter: a row for each micro-batch, and one for the mean."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._devices: list[torch.device] = []
        self._copies: list[tuple[float, float]] = []
        self.follow([])

    def follow(self, places: Sequence[Placement]) -> None:
        """Add parameters."""
        self._devices.extend(place.leaf.device for place in places)
        self._copies.extend((place.sample_copies, place.mean_copies) for place in places)
        self._sample_copies = OnDevices([copies for copies, _ in self._copies])
        self._mean_copies = OnDevices([copies for _, copies in self._copies])
        self._rows.clear()
        self._mean: Row | None = None
        self.clear()

    def free(self) -> None:
        """Free the rows: a tensor for each parameter and micro-batch, which holds more memory than its number."""
        self._rows.clear()
        self._mean = None

    def clear(self) -> None:
        """Begin a window."""
        self._observed: Tensor | None = None
        self._mean_squares: Tensor | None = None

    def cell(self, row: int, index: int) -> Tensor:
        """The cell for the norm of the gradient of parameter `index` from micro-batch `row`."""
        while row >= len(self._rows):
            self._rows.append(Row(self._devices))
        return self._rows[row].views[index]

    def observe(self, squares: Sequence[Tensor], n: int) -> None:
        """Take, in place of the rows, each parameter's sum over n gradients that were not divided by n."""
        self._observed = torch.stack([square.to(squares[0].device) for square in squares]) / n**2

    def write_mean(self, parameters: Sequence[Tensor], write: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        """Have `write(cell, parameter, grad)` write the norm of this rank's part of each `.grad`."""
        if self._mean is None:
            self._mean = Row([p.device for p in parameters])
        for cell, parameter in zip(self._mean.views, parameters, strict=True):
            if parameter.grad is None:
                cell.zero_()
            else:
                write(cell, parameter, part_of(parameter.grad, parameter))
        self._mean_squares = self._mean.squares()

    def forget_mean(self) -> None:
        """Drop the norms of `.grad`."""
        self._mean_squares = None

    def squares(self, fires: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """By parameter: the sum of the samples' squares and the mean's square, each divided by its number of copies."""
        samples = self._observed
        if samples is None:
            samples = torch.stack([row.squares() for row in self._written(fires)]).sum(0)
        mean = self._mean_squares
        samples = _over(samples, self._sample_copies)
        return samples, None if mean is None else _over(mean, self._mean_copies)

    def _written(self, fires: Sequence[int]) -> list[Row]:
        """The window's rows, with 0 for a parameter without a gradient from that micro-batch."""
        rows = self._rows[: max(fires)]
        for index, count in enumerate(fires):
            for row in rows[count:]:
                row.views[index].zero_()
        return rows


def _over(squares: Tensor, copies: OnDevices) -> Tensor:
    return squares if set(copies.numbers) == {1} else squares / copies.on(squares.device)
