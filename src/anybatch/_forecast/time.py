"""How long a step takes: a record's seconds, and what more devices make of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isclose, isfinite, nan, sqrt
from statistics import fmean, median

from anybatch._record import StepRecord

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
    steps: Sequence[StepRecord],
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
    shares = [step.scale / ranks for step in steps]
    share = median(shares) if per_device is None else per_device
    if seconds_per_step is not None:
        return StepTime(share, seconds_per_step / share, 0.0, sync_seconds, share)
    kinds: dict[float, list[float]] = {}
    for size, step in zip(shares, steps, strict=True):
        if isfinite(step.seconds) and step.seconds > 0:
            kinds.setdefault(size, []).append(step.seconds)
    known = {size: median(seconds) for size, seconds in kinds.items() if len(seconds) >= _ENOUGH}
    if len(known) < 2:
        rates = [second / size for size, seconds in kinds.items() for second in seconds]
        return StepTime(share, median(rates) if rates else nan, 0.0, sync_seconds, median(shares))
    x, y = fmean(known), fmean(known.values())
    slope = sum((a - x) * (b - y) for a, b in known.items()) / sum((a - x) ** 2 for a in known)
    slope = min(max(slope, 0.0), y / x)  # neither part is negative
    return StepTime(share, slope, y - slope * x, sync_seconds, None)
