"""Values that describe one window: the backwards of one rank between two optimizer steps."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

PAIR = "consecutive"  # names the norms of this step's gradient and the one before, as two samples


@dataclass(frozen=True)
class Norms:
    """The two squared norms of a window, float64 tensors of shape `[k]`: one entry for each part of the parameters.

    For the whole model k is 1, for norms by layer the number of layers.
    """

    samples: Tensor  # sum_i ||g_i||^2, over the gradients g_i of the micro-batches
    mean: Tensor | None  # ||mean of the g_i||^2; `None` where `.grad` is not yet the average over the ranks

    def times(self, factor: "float | Tensor") -> "Norms":
        """Both norms multiplied by `factor`."""
        return Norms(self.samples * factor, None if self.mean is None else self.mean * factor)

    def over(self, unit: Tensor) -> "Norms":
        """Both norms divided by `unit`, a tensor of shape `[]`; each of the three may be on another device."""
        mean = None if self.mean is None else self.mean / unit.to(self.mean.device)
        return Norms(self.samples / unit.to(self.samples.device), mean)


@dataclass(frozen=True)
class Shares:
    """Sums over the sizes and weights of micro-batches, of one rank or of all; empty ones are not counted."""

    count: int = 0  # number of micro-batches
    inverse_sizes: float = 0.0  # sum of 1 / size
    sizes: float = 0.0
    weights: float = 0.0  # sum of the weights; 1 for each micro-batch that was not given one
    squares: float = 0.0  # sum of the squared weights
    weighted: int = 0  # number of micro-batches with a given weight

    @property
    def inverse(self) -> float:
        """The sum of 1 / size; with weights that of as many micro-batches of the mean size."""
        return self.count**2 / self.sizes if self.weighted else self.inverse_sizes

    @property
    def effective(self) -> float:
        """The number of equal micro-batches with the same noise of the mean: `(sum w)^2 / sum w^2`."""
        return self.weights**2 / self.squares if self.squares else float(self.count)


@dataclass(frozen=True)
class Window:
    """The backwards of one rank between two steps, with the norms of the gradients as observed."""

    backwards: int  # A, the number of micro-batches
    shares: Shares  # sizes and weights of the micro-batches
    sizes: Mapping[str, int]  # k of each probe, by its name; the same on every rank
    norms: Mapping[str, Norms]  # of each probe that measured the window, by its name
    sampled: bool = True  # whether the averages take the window as a sample
    pair_inverse_size: float = 0.0  # with `PAIR` in the norms, one over the size of the earlier micro-batch
