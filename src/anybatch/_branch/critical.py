"""From the losses of the branches to the critical batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from statistics import fmean

from anybatch._forecast import Estimate


@dataclass(frozen=True)
class BatchLoss:
    """The branches of one batch.

    Args:
        factor: The batch over the base batch.
        batch: Examples of a step.
        steps: Optimizer steps of a branch.
        losses: The loss at the end of each seed's branch.
        difference: The loss minus that of the base batch: the mean over seeds, and the lowest and highest seed.
    """

    factor: int
    batch: int
    steps: int
    losses: tuple[float, ...]
    difference: Estimate


def by_batch(losses: Mapping[int, Sequence[float]], *, base_batch: int, examples: int) -> tuple[BatchLoss, ...]:
    """One `BatchLoss` for each factor; `losses` has a loss for each seed, and factor 1."""
    found = []
    for factor in sorted(losses):
        apart = [loss - base for loss, base in zip(losses[factor], losses[1], strict=True)]
        found.append(
            BatchLoss(
                factor,
                factor * base_batch,
                examples // (factor * base_batch),
                tuple(losses[factor]),
                Estimate(fmean(apart), min(apart), max(apart)),
            )
        )
    return tuple(found)


def critical_factor(losses: Mapping[int, Sequence[float]], tolerance: float) -> Estimate:
    """The factor at which the difference from factor 1 is the tolerance, of the means, and its range over seeds."""
    seeds = range(len(losses[1]))
    of_each = [_crossing({k: each[seed] - losses[1][seed] for k, each in losses.items()}, tolerance) for seed in seeds]
    mean = _crossing({k: fmean(each) - fmean(losses[1]) for k, each in losses.items()}, tolerance)
    return Estimate(mean, min(mean, *of_each), max(mean, *of_each))


def _crossing(differences: Mapping[int, float], tolerance: float) -> float:
    """The first factor that leaves the tolerance, between two factors by a line over log(factor); inf if none does."""
    factors = sorted(differences)
    for low, high in pairwise(factors):
        if not differences[high] <= tolerance:  # nan is a branch that diverged
            rise = differences[high] - differences[low]
            share = (tolerance - differences[low]) / rise if isfinite(rise) else 0.0
            return float(low * (high / low) ** share)
    return inf
