"""Whether a schedule fits the length of the run."""

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from math import ceil, log10
from typing import Any

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from anybatch._scaling.preview import parts_of, preview

_TOLERANCE = 0.02  # of the run; schedules are often shorter by a warm-up or an epoch
_LOWEST = 1e-8  # factor on the learning rate below which no schedule anneals
_STILL = 1e-5  # of the highest rate: training stops where the rate stays there, and no floor is chosen so low
_LOW, _HIGH, _JUMP = 0.01, 0.1, 0.5  # of the highest rate: fallen, risen again, and risen in one step by a restart
_POINTS = 512  # at which a schedule is evaluated, and as many in the first 32nd of a long run


def misfit(scheduler: Any, *, length: float, optimizer: Optimizer, jump: str | None) -> str | None:
    """How a schedule does not fit a run of `length` scheduler steps; empty where it does, `None` if unknown.

    A class of torch's with an end is compared with the length. The rates of any other over the whole run are taken from
    a copy (`preview`): they may not stay at 0 before the run's end, nor rise from 0 as slowly as they fell.
    """
    kind, name = type(scheduler), type(scheduler).__name__
    end = _stated_end(scheduler)
    if end is not None:
        fits = abs(end[1] - length) <= max(_TOLERANCE * length, 1.0)
        return "" if fits else f"{name} has {end[0]}={end[1]:g}, the run {length:g} scheduler steps"
    if kind is torch_schedulers.MultiStepLR:
        late = sorted(m for m in scheduler.milestones if m > length)
        return f"{name} has a milestone at {late[0]:g}, the run {length:g} scheduler steps" if late else ""
    if kind in (torch_schedulers.StepLR, torch_schedulers.ExponentialLR) and 0 < scheduler.gamma < 1:
        log_end = length / getattr(scheduler, "step_size", 1) * log10(scheduler.gamma)
        low = f"{name} ends the run, {length:g} scheduler steps, at 1e{log_end:.0f} of its first rate"
        return low if log_end < log10(_LOWEST) else ""
    seen = preview(scheduler, _points(length, len(optimizer.param_groups)), optimizer=optimizer, jump=jump)
    if seen is None:
        return None
    course = Course(name, length, restarts=any(type(part) in _RESTARTS for part in parts_of(scheduler)))
    for t, rates in seen:
        course.see(t, rates)
    return course.misfit


class Course:
    """The base rates of a run of `length` scheduler steps, and whether they end before it.

    With `restarts`, the rates rise again on purpose.
    """

    def __init__(self, name: str, length: float, *, restarts: bool = False) -> None:
        self._name, self._length, self._restarts = name, length, restarts
        self._end = length - max(_TOLERANCE * length, 1.0)
        self._peaks: list[float] = []
        self._level = 1.0  # the highest of the groups' rates, each relative to its highest so far
        self._high, self._fallen, self._low = 0.0, 0.0, -1.0
        self._ended: float | None = None
        self._risen: tuple[float, float] | None = None

    def see(self, t: float, rates: Sequence[float]) -> None:
        """Add the rates of all groups at step `t`."""
        self._peaks = [max(pair) for pair in zip_longest(self._peaks, rates, fillvalue=0.0)]
        levels = [rate / peak for rate, peak in zip(rates, self._peaks, strict=False) if peak > 0]
        if not levels:
            return
        before, self._level = self._level, max(levels)
        if self._level > _LOWEST and not (self._level <= _STILL and self._level == before):
            self._ended = None
        elif self._ended is None:
            self._ended = t
        if self._level <= _LOW:
            if self._low < 0:
                self._fallen = t
            self._low = t
        elif self._level >= _HIGH:
            at_once = before <= _LOW and self._level >= _JUMP
            slowly = t - self._low >= 0.5 * (self._fallen - self._high)
            if 0 <= self._low < self._end and slowly and not at_once and self._risen is None:
                self._risen = self._low, t
            self._high, self._low = t, -1.0

    @property
    def misfit(self) -> str:
        """How the rates seen so far do not fit the run; empty if they do."""
        run = f"the run has {self._length:g} scheduler steps"
        if self._risen is not None and not self._restarts:
            low, again = self._risen
            return (
                f"the learning rate of {self._name} has fallen to 0 at scheduler step {low:g} and has risen again at "
                f"{again:g}; {run}"
            )
        if self._ended is not None and self._ended < self._end:
            return f"the learning rate of {self._name} is 0 from scheduler step {self._ended:g} on; {run}"
        return ""


# The argument that holds the curve's end. Past it a cosine rises, a polynomial is constant and OneCycleLR raises.
_ENDS = {
    torch_schedulers.CosineAnnealingLR: "T_max",
    torch_schedulers.OneCycleLR: "total_steps",
    torch_schedulers.PolynomialLR: "total_iters",
}
_RESTARTS = (torch_schedulers.CosineAnnealingWarmRestarts, torch_schedulers.CyclicLR)


def _stated_end(scheduler: Any) -> tuple[str, float] | None:
    """The name and the value of the argument that states a schedule's length."""
    if type(scheduler) in _ENDS:
        name = _ENDS[type(scheduler)]
        return name, float(getattr(scheduler, name))
    for function in getattr(scheduler, "lr_lambdas", ()):  # those of transformers are partial functions
        keywords = function.keywords if isinstance(function, partial) else {}
        if isinstance(length := keywords.get("num_training_steps"), int | float):
            return "num_training_steps", float(length)
    return None


def _points(length: float, groups: int) -> list[int]:
    """Ascending steps of the run: all of a short run; of a long run, more of the beginning than of the rest."""
    last = ceil(length) - 1
    count = max(64, min(_POINTS, 50_000 // max(1, groups)))
    if last < 2 * count:
        return list(range(last + 1))
    spread = {round(last * i / count) for i in range(count + 1)}
    return sorted(spread | {round(last / 32 * i / count) for i in range(count)})
