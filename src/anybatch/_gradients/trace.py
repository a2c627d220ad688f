"""Trace: whether gradients are still what they were at the end of a backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch._gradients.norms import total_squared_norm


class Trace:
    """Some gradients as they are now. The norm of the smallest shows what changes no version: `grad.data.mul_(c)`, and
    extensions that write through a pointer.

    Args:
        grads: at least one; none is kept alive.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self._seen = _seen(grads)
        self._smallest = min(range(len(grads)), key=lambda i: grads[i].numel())
        self._square = total_squared_norm([grads[self._smallest]])

    def left(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are they, and nobody has written to them; waits for the device only where that seems so."""
        if _seen(grads) != self._seen:
            return False
        square = total_squared_norm([grads[self._smallest]])
        return torch.equal(square, self._square) or bool(square.isnan() & self._square.isnan())


def _seen(grads: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(grad), grad._version) for grad in grads]
