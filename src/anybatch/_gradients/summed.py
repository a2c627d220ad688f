"""One micro-batch of several backwards."""

from torch import Tensor


class SummedBackwards:
    """The sum of each parameter's gradients over the backwards of one micro-batch.

    The norm of a sum cannot be computed from the norms of its parts, so each gradient is copied.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}  # by the parameter's number
        self._begun = False

    def first(self) -> bool:
        """Whether this backward is the micro-batch's first."""
        begun, self._begun = self._begun, True
        return not begun

    def add(self, index: int, grad: Tensor) -> bool:
        """Add a gradient of parameter `index`; true for the first one in this micro-batch."""
        grad = grad.detach()
        first = index not in self.sums
        self.sums[index] = grad.clone() if first else self.sums[index] + grad
        return first
