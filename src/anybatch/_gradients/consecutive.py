"""Consecutive: with one gradient a step, the one before is the second sample."""

from collections.abc import Mapping

import torch
from torch import Tensor

from anybatch._gradients.norms import total_squared_norm
from anybatch._gradients.window import Pair


class Consecutive:
    """Keeps a copy of the last step's gradient: the one buffer of the parameters' size in this library."""

    def __init__(self) -> None:
        self._previous: dict[int, Tensor] | None = None  # by the parameter; what is not there is zero
        self._scale: Tensor | None = None  # the factor on its loss

    def forget(self) -> None:
        """The next gradient has no predecessor: this one was not finite, or not alone in its step."""
        self._previous = None

    def pair(self, grads: Mapping[int, Tensor], *, loss_scale: Tensor | None) -> Pair | None:
        """The norms of the gradients, by their parameters, and of those of the last call; `None` at the first.

        Both are of a loss times `loss_scale`, which may have been another one then.
        """
        before_scale, self._scale = self._scale, loss_scale
        if self._previous is None:
            self._previous = {index: g.detach().clone() for index, g in grads.items()}
            return None
        held = self._previous
        if before_scale is not None and loss_scale is not None:
            torch._foreach_mul_(list(held.values()), loss_scale / before_scale)
        before, now = total_squared_norm(held.values()), total_squared_norm(grads.values())
        both = [index for index in grads if index in held]
        if both:  # the buffer holds the sum for a moment: no second copy
            torch._foreach_add_([held[index] for index in both], [grads[index] for index in both])
        held.update({index: g.detach().clone() for index, g in grads.items() if index not in held})
        together = total_squared_norm(held.values())
        for index, buffer in held.items():
            if index in grads:
                buffer.copy_(grads[index])
            else:
                buffer.zero_()
        return Pair((before + now) / 2, together / 4)
