"""Values that describe one window: what one rank saw between two optimizer steps."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

PAIR = "consecutive"  # the name of the norms of this step's gradient and the one before, as two samples


@dataclass(frozen=True)
class Norms:
    """The two squared norms of a window, float64 tensors of shape `[k]`: one entry for each part of the parameters.

        samples = sum_i ||g_i||^2          mean = ||gbar||^2          gbar = mean of the g_i

    k is 1 for the whole model and the number of layers for norms by layer.

    Args:
        samples: sum of the squared norms of the micro-batches' gradients.
        mean: squared norm of the mean gradient; `None` where `.grad` is not the average over the ranks yet.
    """

    samples: Tensor
    mean: Tensor | None

    def times(self, factor: "float | Tensor") -> "Norms":
        """Both norms multiplied by `factor`."""
        return Norms(self.samples * factor, None if self.mean is None else self.mean * factor)

    def over(self, unit: Tensor) -> "Norms":
        """Both norms divided by `unit`, a tensor of shape `[]` on any device."""
        unit = unit.to(self.samples.device)
        return Norms(self.samples / unit, None if self.mean is None else self.mean / unit)


@dataclass(frozen=True)
class Shares:
    """Sizes and weights of some micro-batches, as sums over them; of one rank or of all.

    Args:
        count: number of micro-batches.
        inverse_sizes: sum of one over the size.
        sizes: sum of the sizes.
        weights: sum of the weights of those that have one.
        squares: sum of the squared weights.
        weighted: number of micro-batches with a weight.
    """

    count: int = 0
    inverse_sizes: float = 0.0
    sizes: float = 0.0
    weights: float = 0.0
    squares: float = 0.0
    weighted: int = 0

    @property
    def inverse(self) -> float:
        """The sum of one over a size. With weights all micro-batches count as if they had the mean size."""
        return self.count**2 / self.sizes if self.weighted else self.inverse_sizes

    @property
    def effective(self) -> float:
        """The number of equal micro-batches whose mean is as noisy: `(sum w)^2 / sum w^2`."""
        return self.weights**2 / self.squares if self.weighted else self.count


@dataclass(frozen=True)
class Window:
    """What one rank saw between two steps. The norms are of gradients as they were observed.

    Args:
        backwards: A, the number of micro-batches.
        shares: sizes and weights of the micro-batches.
        sizes: k of each probe, by its name; the same on every rank.
        norms: the norms of each probe that measured the window, by its name.
        sampled: whether the averages take the window as a sample.
        pair_inverse_size: with `PAIR` among the norms, one over the size of the earlier micro-batch.
    """

    backwards: int
    shares: Shares
    sizes: Mapping[str, int]
    norms: Mapping[str, Norms]
    sampled: bool = True
    pair_inverse_size: float = 0.0
