"""Weighing: the norms of one window in Adam's metric, beside the Euclidean ones that `Gather` takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch._gradients.metric import Metric
from anybatch._gradients.slots import Rows, Slots
from anybatch._gradients.window import Weighed


class Weighing:
    """One window: opened, then given every gradient, then read. A single gradient without weights leaves it unknown.

    Args:
        metric: the weights.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._parameters: list[Tensor] = []
        self._leaves: list[Tensor] = []
        self._rows = Rows(self._leaves)
        self._grads: Slots | None = None
        self.clear()

    def follow(self, parameters: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        """Weigh these too; `leaves` are the tensors on which their gradients arrive."""
        self._metric.follow(parameters)
        self._parameters.extend(parameters)
        self._leaves.extend(leaves)
        self._rows = Rows(self._leaves)
        self._grads = None
        self.clear()

    def clear(self) -> None:
        """Nothing of a window is known."""
        self._known = False
        self._observed: Tensor | None = None
        self._grad_square: Tensor | None = None

    def open(self) -> None:
        """A window begins."""
        self._known = self._metric.open()

    def sample(self, row: int, index: int, grad: Tensor) -> None:
        """The gradient that parameter `index` got from micro-batch `row`."""
        if not self._known:
            return
        self._known = self._metric.sample_into(self._rows.view(row, index), self._parameters[index], grad)

    def samples(self, samples: Sequence[Tensor]) -> None:
        """All gradients of a step at once, one tensor `[n, *shape]` a parameter."""
        if not self._known:
            return
        squares = list(map(self._metric.samples_square, self._parameters, samples))
        found = [square for square in squares if square is not None]
        self._known = len(found) == len(squares)
        if self._known:
            self._observed = torch.stack(found).sum() / samples[0].shape[0] ** 2

    def grads(self) -> None:
        """`.grad` as it is now, this rank's part of it."""
        if not self._known:
            return
        if self._grads is None:
            self._grads = Slots(self._parameters)
        self._known = all(map(self._metric.grad_into, self._grads.views, self._parameters))
        self._grad_square = self._grads.total()

    def squares(self, fires: Sequence[int]) -> Weighed:
        """The window's norms, of parameters that got `fires` gradients each."""
        if not self._known:
            return Weighed()
        samples = self._observed
        if samples is None:
            samples = torch.stack([slots.total() for slots in self._rows.written(fires)]).sum()
        return Weighed(samples, samples if self._grad_square is None else self._grad_square)
