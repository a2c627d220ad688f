"""Window: what one rank saw between two optimizer steps, in numbers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Norms of two consecutive gradients: what the one-gradient estimator needs; float64 tensors of shape `[]`."""

    mean_square: Tensor
    square_mean: Tensor


@dataclass(frozen=True)
class Window:
    """What one rank saw between two steps. Norms are of OBSERVED gradients, float64 tensors of shape `[]`, or `None`.

    Args:
        backwards: A, the number of micro-batches.
        inverse_sizes: sum over them of one over their size.
        samples_square: sum over the micro-batches of the squared norms of their gradients.
        grad_square: squared norm of `.grad`.
        pair: with one backward in a window, this gradient and the one before.
    """

    backwards: int
    inverse_sizes: float
    samples_square: Tensor | None
    grad_square: Tensor | None
    pair: Pair | None
