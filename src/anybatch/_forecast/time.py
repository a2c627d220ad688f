"""The time of a step: a record's seconds, scaled to other numbers of devices."""

from dataclasses import dataclass
from math import ceil, isclose, nan, sqrt
from statistics import fmean

import torch

from anybatch._forecast.bounds import Steps
from anybatch._numbers import median

_ENOUGH = 8  # steps of one size, for a median


@dataclass(frozen=True)
class StepTime:
    """The throughput model: the number of devices grows with the batch, at a constant share per device.

        devices = ceil(S / per_device)      step = per_base * S / devices + fixed + (sync if devices > 1)

    The sum of gradient and synchronisation is an upper bound if they overlap (Pollux' exponent 1). Steps of one size do
    not show which part of their time grows with the size. So for another size the gradient's time is a range: from the
    same time to a time in proportion.
    """

    per_device: float  # base batches
    per_base: float  # seconds for the gradient of one base batch on one device; nan if unknown
    fixed: float  # seconds a step that do not depend on the batch
    sync: float  # seconds a step, with more than one device
    measured: float | None  # base batches per device in the timed steps; None for several sizes

    def devices(self, scale: float) -> int:
        """Return the number of devices of a step at `scale`."""
        return max(1, ceil(scale / self.per_device - 1e-9))

    def step(self, scale: float) -> tuple[float, float, float]:
        """Return the seconds of one step at `scale`: the geometric mean of a range, its low and its high end."""
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
    """Return the model, from the arguments or else from the record.

    For steps of several sizes, a line through the medians of their seconds separates the constant part.
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
