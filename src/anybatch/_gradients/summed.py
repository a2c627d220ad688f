"""Several backwards that are one micro-batch."""

from collections.abc import Mapping

from torch import Tensor


class SummedBackwards:
    """Sums up what the backwards of one micro-batch give each parameter.

    The norm of a sum cannot be computed from the norms of its parts, so it takes a copy of the gradient.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._begun = False

    def first(self) -> bool:
        """Whether this backward is the micro-batch's first."""
        begun, self._begun = self._begun, True
        return not begun

    def add(self, index: int, grad: Tensor) -> bool:
        """Add a gradient of parameter `index`; true for its first in this micro-batch."""
        grad = grad.detach()
        if index in self._sums:
            self._sums[index] = self._sums[index] + grad
            return False
        self._sums[index] = grad.clone()
        return True

    @property
    def sums(self) -> Mapping[int, Tensor]:
        """Each parameter's gradient, summed over the micro-batch's backwards so far."""
        return self._sums
