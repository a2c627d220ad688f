"""Window: what one rank saw between two optimizer steps, in numbers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Norms of two consecutive gradients: what the one-gradient estimator needs; float64 tensors of shape `[]`."""

    mean_square: Tensor
    square_mean: Tensor


@dataclass(frozen=True)
class Weighed:
    """The window's two norms once more, in Adam's metric; `None` where its weights were not known."""

    samples_square: Tensor | None = None
    grad_square: Tensor | None = None

    def over(self, unit: Tensor) -> "Weighed":
        """Both divided by `unit`."""
        if self.samples_square is None or self.grad_square is None:
            return self
        return Weighed(self.samples_square / unit, self.grad_square / unit)


@dataclass(frozen=True)
class Window:
    """What one rank saw between two steps. Norms are of OBSERVED gradients, float64 tensors of shape `[]`, or `None`.

    Args:
        backwards: A, the number of micro-batches.
        inverse_sizes: sum over them of one over their size.
        samples_square: sum over the micro-batches of the squared norms of their gradients.
        grad_square: squared norm of `.grad`.
        pair: with one backward in a window, this gradient and the one before.
        weighed: the norms in Adam's metric; `None` where nobody asks for them.
    """

    backwards: int
    inverse_sizes: float
    samples_square: Tensor | None
    grad_square: Tensor | None
    pair: Pair | None
    weighed: Weighed | None = None
