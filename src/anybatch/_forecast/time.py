"""How long a step takes: a record's seconds, and what more devices make of them."""

from dataclasses import dataclass
from math import ceil, isclose, nan, sqrt
from statistics import fmean

import torch

from anybatch._forecast.bounds import Steps
from anybatch._numbers import median

_ENOUGH = 8  # steps of one kind, for a median


@dataclass(frozen=True)
class StepTime:
    """The throughput model: the devices grow with the batch, and each goes on doing its share.

        devices = ceil(S / per_device)      step = per_base * S / devices + fixed + (sync if devices > 1)

    Gradient and synchronisation are added; where they overlap, this is an upper bound (Pollux' exponent 1).
    Steps of one size do not show what part of their time grows with it. So for another size the gradient takes from
    the same time to a time in proportion.

    Args:
        per_device: base batches that one device takes in a step.
        per_base: seconds for the gradient of one base batch on one device; nan where not known.
        fixed: seconds a step that do not depend on the batch.
        sync: seconds of synchronisation a step, with more than one device.
        measured: base batches of a device in the steps that were timed, if all had one size; `None` for several sizes.
    """

    per_device: float
    per_base: float
    fixed: float
    sync: float
    measured: float | None

    def devices(self, scale: float) -> int:
        """How many devices a step at `scale` takes."""
        return max(1, ceil(scale / self.per_device - 1e-9))

    def step(self, scale: float) -> tuple[float, float, float]:
        """Seconds of one step at `scale`: the middle of a range by ratios, its low end and its high one."""
        devices = self.devices(scale)
        rest = self.fixed + (self.sync if devices > 1 else 0.0)
        size = scale / devices
        other = size if self.measured is None or isclose(size, self.measured) else self.measured
        low, high = self.per_base * min(size, other), self.per_base * max(size, other)
        return sqrt(low * high) + rest if low < high else low + rest, low + rest, high + rest


def step_time(
    steps: Steps,
    *,
    ranks: float,
    per_device: float | None,
    seconds_per_step: float | None,
    sync_seconds: float,
) -> StepTime:
    """The model, from what was given, and else from the record.

    Where a run's steps had several sizes, a line through the medians of their seconds parts what grows with the batch
    from what does not.
    """
    shares, seconds = steps["scale"] / ranks, steps["seconds"]
    share = median(shares) if per_device is None else per_device
    if seconds_per_step is not None:
        return StepTime(share, seconds_per_step / share, 0.0, sync_seconds, share)
    timed = seconds.isfinite() & (seconds > 0)
    shares, seconds = shares[timed], seconds[timed]
    _, kind, counts = shares.unique(return_inverse=True, return_counts=True)
    many = counts >= _ENOUGH
    ends = [(end - count, end) for count, end in torch.stack([counts, counts.cumsum(0)], 1)[many].tolist()]
    order = kind.argsort(stable=True)
    of_kinds = sorted((order[begin:end] for begin, end in ends), key=lambda of_kind: int(of_kind[0]))
    known = {shares[of_kind[0]].item(): median(seconds[of_kind]) for of_kind in of_kinds}
    if len(known) < 2:
        rate = median(seconds / shares) if len(seconds) else nan
        return StepTime(share, rate, 0.0, sync_seconds, median(steps["scale"] / ranks))
    x, y = fmean(known), fmean(known.values())
    slope = sum((a - x) * (b - y) for a, b in known.items()) / sum((a - x) ** 2 for a in known)
    slope = min(max(slope, 0.0), y / x)  # neither part is negative
    return StepTime(share, slope, y - slope * x, sync_seconds, None)
