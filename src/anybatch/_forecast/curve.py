"""A record's moments as functions of tau, for every scale.

The variance and the squared mean of one base batch's gradient depend on the
progress of training, and hardly on the batch size so far. So the raw moments of one run, smoothed along tau, are used
at every other scale.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from anybatch._errors import InvalidValueError
from anybatch._forecast.bounds import Steps
from anybatch._numbers import chosen

# Share of the run. From a record at scale 8 or more, 4 % forecasts as well as 2 % (measured on the digits). From one at
# 1 or 2, with only two samples a step, it forecasts better.
_WINDOW = 0.04
_BLOCK = 0.005  # share of a bootstrap block: fluctuations of neighbouring steps are not independent
_BINS = 2000
_GRID = 500
# The last quarter of the record is compared with these quarters, at these distances (shares of the record).
_SPANS = ((1, 0.25), (0, 0.5))
_LEAST = 4  # steps in a window


@dataclass(frozen=True)
class Samples:
    """The measured steps of a run in bins of tau."""

    tau: list[float]  # mean position of the bin's gradients, base iterations
    weight: list[float]  # base iterations
    variance: list[float]  # weighted means of the raw moments, grad^2
    sqnorm: list[float]
    steps: list[int]
    end: float  # last tau of the run, base iterations
    total: float  # base iterations of the whole run
    beyond: int  # measured steps that began beyond the total, which are left out


@dataclass(frozen=True)
class Curves:
    """Several versions of the smoothed moments on an even grid from 0 to `total` base iterations."""

    variance: Tensor  # float64 [versions, points]
    sqnorm: Tensor
    total: float

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Interpolate both moments linearly at `tau`, `[..., versions]`."""
        x = tau * (_GRID / self.total)
        i = x.long().clamp_(0, _GRID - 1)
        share, row = x - i, torch.arange(len(self.variance))
        variance, sqnorm = (
            torch.lerp(values[row, i], values[row, i + 1], share) for values in (self.variance, self.sqnorm)
        )
        return variance, sqnorm


def samples(steps: Steps, *, total: float, record: str) -> Samples:
    """Return the raw moments of the steps that moved the clock.

    A step's weight is the mean advance of the clock in this step and the one before. Its own advance alone would give
    more weight to steps whose random error increases the gain.
    """
    measured = steps["raw_variance"].isfinite() & steps["raw_sqnorm"].isfinite()
    if not measured.any():
        raise InvalidValueError(
            f"{record} has no step with a variance, so a forecast is not possible. Record a run with rule=AdaScale() "
            "and two or more gradients a step: accumulate, use several ranks, or anybatch.split(batch, 2). Scale 1 in "
            "two halves is enough."
        )
    tau, moved, variance, sqnorm = (
        chosen(steps[name], measured) for name in ("tau", "iterations", "raw_variance", "raw_sqnorm")
    )
    start, weight = (tau - moved).clamp(min=0.0), (torch.cat([moved[:1], moved[:-1]]) + moved) / 2
    inside = start < total
    start, weight, variance, sqnorm = (chosen(column, inside) for column in (start, weight, variance, sqnorm))
    if not len(start):
        raise InvalidValueError(
            f"{record} has a variance only beyond tau = {total:g}, the total in its header: correct the header."
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
    """Smooth the moments over a window of 4 % of the run, and extrapolate the last quarter of an unfinished one.

    Args:
        found: The samples.
        trend: The share of the trend that continues after the record's end, `[versions]`; 0 keeps the last values. A
            half is between training with a constant and with a falling learning rate. The part above 1 multiplies the
            steeper of two trends: since the third and since the second quarter. The noise scale often grows faster
            towards the end, and one trend alone is uncertain.
        draws: Factors on the samples' weights, `[versions, samples]`.
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
        # Start at the middle of the last quarter, because the last few steps alone are mostly noise.
        beyond = torch.arange(len(points), _GRID + 1, dtype=torch.float64) * step - 0.875 * end
        late_variance, late_sqnorm = (values[:, 2:] for values in quarters)
        variance = torch.cat([variance, late_variance.expand(-1, len(beyond))], 1)
        sqnorm = torch.cat([sqnorm, late_sqnorm * torch.exp(slope[:, None] * beyond)], 1)
    if not (variance.isfinite().all() and sqnorm.isfinite().all()):
        raise InvalidValueError(
            "The record's steps have no mean, because iterations or moments of some steps exceed those of others by "
            "more than float64's precision. Delete the damaged lines."
        )
    return Curves(variance, sqnorm, found.total)


def _inside(found: Samples, low: float, high: float) -> tuple[int, int]:
    """Return the range of samples from `low` to `high`, extended to the nearest ones until it has enough steps."""
    i, j = bisect_left(found.tau, low), bisect_right(found.tau, high)
    steps, middle = sum(found.steps[i:j]), (low + high) / 2
    while steps < _LEAST and (i > 0 or j < len(found.tau)):
        left = middle - found.tau[i - 1] if i > 0 else inf
        right = found.tau[j] - middle if j < len(found.tau) else inf
        i, j = (i - 1, j) if left < right else (i, j + 1)
        steps = sum(found.steps[i:j])
    return i, j


def _slope(variance: Tensor, sqnorm: Tensor, *, distance: float) -> Tensor:
    """Return the slope of log(sqnorm / variance), at most 0: a rise would grow without bound."""
    known = (torch.minimum(variance, sqnorm) > 0).all(1)
    ratio = torch.where(known[:, None], sqnorm / variance, 1.0)
    return torch.log(ratio[:, 1] / ratio[:, 0]).clamp_(max=0.0) / distance


def resampled(found: Samples, *, versions: int, generator: torch.Generator) -> Tensor:
    """Return bootstrap factors of mean 1 on the samples' weights, equal in a block of tau: `[versions, samples]`."""
    blocks = torch.tensor([int(tau / (_BLOCK * found.total)) for tau in found.tau])
    drawn = torch.empty(versions, int(blocks[-1]) + 1, dtype=torch.float64).exponential_(generator=generator)
    return drawn[:, blocks]
