"""The one-gradient estimator: the gradient of the step before is the second sample."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch._gradients.norms import total_squared_norm
from anybatch._gradients.window import Norms


@dataclass(frozen=True)
class Pair:
    """This step's gradient and the one before as two samples."""

    norms: Norms  # of the two and of their mean
    inverse_size: float  # one over the size of the earlier micro-batch


class ConsecutiveGradients:
    """A copy of the last step's gradient: the only buffer of the parameters' size in this library."""

    def __init__(self) -> None:
        self._previous: dict[int, Tensor] | None = None  # by the parameter's number; a missing one is zero
        self._scale: Tensor | None = None  # the factor on the loss of that step
        self._inverse_size = 1.0

    def forget(self) -> None:
        """Drop the copy, where its gradient was not finite or not alone in its step."""
        self._previous = None

    def pair(self, grads: Mapping[int, Tensor], *, loss_scale: Tensor | None, inverse_size: float) -> Pair | None:
        """This step's gradients, by the parameters' numbers, and those of the last call; `None` at the first call.

        `loss_scale` is the factor on this step's loss, a tensor of shape `[]`, or `None`. If the factor has changed,
        the earlier gradient is multiplied to match. `inverse_size` is one over the size of this step's micro-batch.
        """
        before_scale, self._scale = self._scale, loss_scale
        before_size, self._inverse_size = self._inverse_size, inverse_size
        if self._previous is None:
            self._previous = {index: g.detach().clone() for index, g in grads.items()}
            return None
        held = self._previous
        if before_scale is not None and loss_scale is not None:
            ratio = loss_scale / before_scale
            for buffer in held.values():
                buffer.mul_(ratio.to(buffer.device))
        before, now = total_squared_norm(held.values()), total_squared_norm(grads.values())
        both = [index for index in grads if index in held]
        if both:  # the buffer holds the sum for now, without a second copy
            torch._foreach_add_([held[index] for index in both], [grads[index] for index in both])
        held.update({index: g.detach().clone() for index, g in grads.items() if index not in held})
        together = total_squared_norm(held.values())
        for index, buffer in held.items():
            if index in grads:
                buffer.copy_(grads[index])
            else:
                buffer.zero_()
        return Pair(Norms((before + now)[None], (together / 4)[None]), before_size)
