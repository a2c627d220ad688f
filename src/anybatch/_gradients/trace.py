"""Trace: whether gradients are still what they were at the end of a backward."""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from anybatch._gradients.norms import total_squared_norm


class Trace:
    """Some gradients as they are now. The norm of the smallest shows what changes no version: `grad.data.mul_(c)`, a
    `GradScaler` that unscales, and extensions that write through a pointer. If it is 0 it would stay 0, and tells
    nothing.

    Args:
        grads: at least one; none is kept alive.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self._seen = _seen(grads)
        self._smallest = min(range(len(grads)), key=lambda i: grads[i].numel() or inf)
        self._square = total_squared_norm([grads[self._smallest]])

    def left(self, grads: Sequence[Tensor]) -> bool:
        """Whether these surely are they, and nobody has written to them; waits for the device where it seems so."""
        if _seen(grads) != self._seen:
            return False
        square = total_squared_norm([grads[self._smallest]])
        same = torch.equal(square, self._square) or bool(square.isnan() & self._square.isnan())
        return same and bool(square)


def _seen(grads: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(grad), grad._version) for grad in grads]
