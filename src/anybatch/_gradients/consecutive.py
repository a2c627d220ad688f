"""Consecutive: with one gradient a step, the one before is the second sample."""

import torch
from torch import Tensor

from anybatch._gradients.norms import total_squared_norm
from anybatch._gradients.window import Pair


class Consecutive:
    """Keeps a copy of the last step's gradient: the one buffer of the parameters' size in this library."""

    def __init__(self) -> None:
        self._previous: list[Tensor] | None = None

    def forget(self) -> None:
        """The next gradient has no predecessor: this one was not finite, not alone in its step, or not whole."""
        self._previous = None

    def pair(self, grads: list[Tensor]) -> Pair | None:
        """The norms of `grads` and of those of the last call; `None` at the first."""
        if self._previous is None:
            self._previous = [g.detach().clone() for g in grads]
            return None
        before = total_squared_norm(self._previous)
        now = total_squared_norm(grads)
        torch._foreach_add_(self._previous, grads)  # the buffer holds the sum for a moment: no second copy
        together = total_squared_norm(self._previous)
        torch._foreach_copy_(self._previous, grads)
        return Pair((before + now) / 2, together / 4)
