"""A record's moments as functions of tau, whatever the scale they were measured at.

[Note: moments belong to tau] The variance and the squared mean of one base batch's gradient are a property of where
training is, not of the batch it got there with. So the raw moments of one run, smoothed along tau, stand for those of
every other scale.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from anybatch._errors import InvalidValueError
from anybatch._forecast.bounds import Steps
from anybatch._numbers import chosen

# Shares of the run. 4 % forecasts as well as 2 % from a record at scale 8 or more, and better from one at 1 or 2, where
# two samples a step are all there is (tried on the digits).
_WINDOW = 0.04
_BLOCK = 0.005  # what the bootstrap draws together: fluctuations of neighbouring steps are not independent
_BINS = 2000
_GRID = 500
_SPANS = (
    (1, 0.25),
    (0, 0.5),
)  # which quarter the last one is compared with, and how far it is, as a share of the record
_LEAST = 4  # steps in a window, however few the record has


@dataclass(frozen=True)
class Samples:
    """The measured steps of a run in order of tau, in bins.

    Args:
        tau: where each bin's gradients were taken, base iterations.
        weight: base iterations that each stands for.
        variance, sqnorm: weighted means of the raw moments, grad^2.
        steps: how many steps are in it.
        end: how far the run got, base iterations.
        total: base iterations of the whole run.
        beyond: measured steps that began beyond the total, and are not in it.
    """

    tau: list[float]
    weight: list[float]
    variance: list[float]
    sqnorm: list[float]
    steps: list[int]
    end: float
    total: float
    beyond: int


@dataclass(frozen=True)
class Curves:
    """Smoothed moments on an even grid from 0 to `total`, several versions of them.

    Args:
        variance, sqnorm: `[versions, points]`, float64.
        total: base iterations of the whole run.
    """

    variance: Tensor
    sqnorm: Tensor
    total: float

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments at `tau`, `[..., versions]`; linear between the points of the grid."""
        x = tau * (_GRID / self.total)
        i = x.long().clamp_(0, _GRID - 1)
        share, row = x - i, torch.arange(len(self.variance))
        variance, sqnorm = (
            torch.lerp(values[row, i], values[row, i + 1], share) for values in (self.variance, self.sqnorm)
        )
        return variance, sqnorm


def samples(steps: Steps, *, total: float, record: str) -> Samples:
    """The raw moments of the steps that moved the clock.

    A step's weight is half of what the step before it and the step itself moved the clock. Its own alone would favour
    the steps whose chance error was towards a large gain.

    Raises:
        InvalidValueError: no step shows a variance.
    """
    measured = steps["raw_variance"].isfinite() & steps["raw_sqnorm"].isfinite()
    if not measured.any():
        raise InvalidValueError(
            f"{record} has no step that shows a variance, so there is nothing to forecast from. Record a run with "
            "rule=AdaScale() and two or more gradients a step: accumulate, use several ranks, or anybatch.split(batch, "
            "2); scale 1 in two halves is enough."
        )
    tau, moved, variance, sqnorm = (
        chosen(steps[name], measured) for name in ("tau", "iterations", "raw_variance", "raw_sqnorm")
    )
    start, weight = (tau - moved).clamp(min=0.0), (torch.cat([moved[:1], moved[:-1]]) + moved) / 2
    inside = start < total
    start, weight, variance, sqnorm = (chosen(column, inside) for column in (start, weight, variance, sqnorm))
    if not len(start):
        raise InvalidValueError(
            f"{record} shows a variance only beyond tau = {total:g}, the total that its header has: correct the header."
        )
    place = (start / total * _BINS).long()
    counts = place.bincount()
    held = counts > 0
    weights = place.bincount(weights=weight)[held]

    def means(values: Tensor) -> list[float]:
        return (place.bincount(weights=weight * values)[held] / weights).tolist()

    return Samples(
        tau=means(start),
        weight=weights.tolist(),
        variance=means(variance),
        sqnorm=means(sqnorm),
        steps=counts[held].tolist(),
        end=min(steps["tau"][-1].item(), total),
        total=total,
        beyond=int((~inside).sum()),
    )


def curves(found: Samples, *, trend: Tensor, draws: Tensor) -> Curves:
    """The moments smoothed over a window of 4 % of the run; past the record's end its last quarter, with its trend.

    Args:
        found: the samples.
        trend: how much of the trend goes on past the record's end, `[versions]`: 0 holds the last values, 1 follows it;
            a half lies between what training does under a constant and under a falling learning rate. Above 1 it gets
            steeper, by as much again of the steeper one of the trends since the third and the second quarter: the noise
            scale often grows faster towards the end, and one trend alone is known badly.
        draws: factors on the samples' weights, `[versions, samples]`.
    """
    weights = draws * torch.tensor(found.weight, dtype=torch.float64)
    columns = torch.tensor([[1.0] * len(found.tau), found.variance, found.sqnorm], dtype=torch.float64)
    sums = torch.nn.functional.pad((weights[:, None] * columns).cumsum(-1), (1, 0))  # [versions, 3, samples + 1]

    def means(windows: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
        low, high = torch.tensor([_inside(found, *window) for window in windows]).T
        weight, variance, sqnorm = (sums[..., high] - sums[..., low]).unbind(1)
        return variance / weight, sqnorm / weight  # each [versions, windows]

    end, half, step = found.end, _WINDOW / 2 * found.total, found.total / _GRID
    points = [k * step for k in range(_GRID + 1) if k * step <= end]
    variance, sqnorm = means([(tau - half, tau + half) for tau in points])
    if len(points) <= _GRID:
        quarters = means([(0.25 * end, 0.5 * end), (0.5 * end, 0.75 * end), (0.75 * end, end)])
        last, long = (_slope(*(values[:, (first, 2)] for values in quarters), distance=d * end) for first, d in _SPANS)
        slope = trend.clamp(max=1) * last + (trend - 1).clamp(min=0) * torch.minimum(last, long)
        # From the middle of the last quarter: the last few steps alone are mostly noise.
        beyond = torch.arange(len(points), _GRID + 1, dtype=torch.float64) * step - 0.875 * end
        late_variance, late_sqnorm = (values[:, 2:] for values in quarters)
        variance = torch.cat([variance, late_variance.expand(-1, len(beyond))], 1)
        sqnorm = torch.cat([sqnorm, late_sqnorm * torch.exp(slope[:, None] * beyond)], 1)
    if not (variance.isfinite().all() and sqnorm.isfinite().all()):
        raise InvalidValueError(
            "The record's steps are so unlike that they have no mean: iterations or moments of some are beyond all "
            "digits of the others'. Look for lines that are damaged, and delete them."
        )
    return Curves(variance, sqnorm, found.total)


def _inside(found: Samples, low: float, high: float) -> tuple[int, int]:
    """The range of samples from `low` to `high`, with nearer ones around it until it holds enough steps."""
    i, j = bisect_left(found.tau, low), bisect_right(found.tau, high)
    steps, middle = sum(found.steps[i:j]), (low + high) / 2
    while steps < _LEAST and (i > 0 or j < len(found.tau)):
        left = middle - found.tau[i - 1] if i > 0 else inf
        right = found.tau[j] - middle if j < len(found.tau) else inf
        i, j = (i - 1, j) if left < right else (i, j + 1)
        steps = sum(found.steps[i:j])
    return i, j


def _slope(variance: Tensor, sqnorm: Tensor, *, distance: float) -> Tensor:
    """How fast the logarithm of `sqnorm / variance` falls; a rise is not followed, for it would grow without end."""
    known = (torch.minimum(variance, sqnorm) > 0).all(1)
    ratio = torch.where(known[:, None], sqnorm / variance, 1.0)
    return torch.log(ratio[:, 1] / ratio[:, 0]).clamp_(max=0.0) / distance


def resampled(found: Samples, *, versions: int, generator: torch.Generator) -> Tensor:
    """Bootstrap factors of mean 1 on the samples' weights, one draw for each block of tau: `[versions, samples]`."""
    blocks = torch.tensor([int(tau / (_BLOCK * found.total)) for tau in found.tau])
    drawn = torch.empty(versions, int(blocks[-1]) + 1, dtype=torch.float64).exponential_(generator=generator)
    return drawn[:, blocks]
