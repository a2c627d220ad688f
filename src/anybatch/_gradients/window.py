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
class ByLayer:
    """The window's two norms by layer, float64 tensors of shape `[layers]`; `None` where they are not known.

    Args:
        names: of the layers, in the model's order.
    """

    names: tuple[str, ...]
    samples_squares: Tensor | None = None
    grad_squares: Tensor | None = None

    def over(self, unit: Tensor) -> "ByLayer":
        """Both divided by `unit`."""
        if self.samples_squares is None or self.grad_squares is None:
            return self
        samples, grads = (squares / unit.to(squares.device) for squares in (self.samples_squares, self.grad_squares))
        return ByLayer(self.names, samples, grads)


@dataclass(frozen=True)
class Shares:
    """What each of some micro-batches is of their mean: sums over them, on one rank or on all.

    Args:
        count: how many they are.
        inverse_sizes: of one over their size.
        sizes: of their size.
        weights: of their weight, if they have one.
        squares: of its square.
        weighted: how many have one.
    """

    count: int = 0
    inverse_sizes: float = 0.0
    sizes: float = 0.0
    weights: float = 0.0
    squares: float = 0.0
    weighted: int = 0

    @property
    def inverse(self) -> float:
        """The sum of one over a size; with weights, which say how much each tells, as if all were of the mean size."""
        return self.count**2 / self.sizes if self.weighted else self.inverse_sizes

    @property
    def effective(self) -> float:
        """As many equal micro-batches as these would have a mean as noisy: `(sum w)^2 / sum w^2`."""
        return self.weights**2 / self.squares if self.weighted else self.count


@dataclass(frozen=True)
class Window:
    """What one rank saw between two steps. Norms are of OBSERVED gradients, float64 tensors of shape `[]`, or `None`.

    Args:
        backwards: A, the number of micro-batches.
        shares: of each in their mean.
        samples_square: sum over the micro-batches of the squared norms of their gradients.
        grad_square: squared norm of `.grad`.
        pair: with one backward in a window, this gradient and the one before.
        weighed: the norms in Adam's metric; `None` where nobody asks for them.
        layers: the norms by layer; `None` at a step that nobody looks at, on one rank, and where nobody ever does.
    """

    backwards: int
    shares: Shares
    samples_square: Tensor | None
    grad_square: Tensor | None
    pair: Pair | None
    weighed: Weighed | None = None
    layers: ByLayer | None = None
