"""Whether a schedule was written for the length of the run."""

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from math import ceil, log10
from typing import Any

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from anybatch._scaling.preview import parts_of, preview

_TOLERANCE = 0.02  # of the run; schedules are often a warm-up or an epoch short of it
_LOWEST = 1e-8  # a factor on the rate below which no one anneals
_STILL = 1e-5  # of the highest rate: a rate that stays there trains nothing, and no floor is chosen so low
_LOW, _HIGH, _JUMP = 0.01, 0.1, 0.5  # of the highest rate: fallen, risen again, and risen at once, by a restart
_POINTS = 512  # at which a schedule is asked, and as many in the first 32nd of a long run


def misfit(scheduler: Any, *, length: float, optimizer: Optimizer | None = None, jump: str | None = None) -> str | None:
    """In what a schedule does not fit a run that ends at its step `length`; empty where it does, `None` if unknown.

    A class of torch's with an end is compared with the length. Of any other schedule, the rates over the whole run
    are taken from a copy: they may not stay at 0 before the run's end, nor come back from 0 as slowly as they fell.

    Args:
        scheduler: the real one, unwrapped.
        length: scheduler steps.
        optimizer: the one that it moves.
        jump: as for `preview`.
    """
    kind, name = type(scheduler), type(scheduler).__name__
    end = _stated_end(scheduler)
    if end is not None:
        fits = abs(end[1] - length) <= max(_TOLERANCE * length, 1.0)
        return "" if fits else f"{name} has {end[0]}={end[1]:g}, the run {length:g} scheduler steps"
    if kind is torch_schedulers.MultiStepLR:
        late = sorted(m for m in scheduler.milestones if m > length)
        return f"{name} has a milestone at {late[0]:g}, the run {length:g} scheduler steps" if late else ""
    factor = _decay(scheduler)
    if factor is not None and 0 < factor[0] < 1:
        log_end = length / factor[1] * log10(factor[0])
        said = f"{name} ends the run, {length:g} scheduler steps, at 1e{log_end:.0f} of its first rate"
        return said if log_end < log10(_LOWEST) else ""
    if optimizer is None:
        return None
    asked = preview(scheduler, _points(length, len(optimizer.param_groups)), optimizer=optimizer, jump=jump)
    if asked is None:
        return None
    course = Course(name, length, restarts=any(type(part) in _RESTARTS for part in parts_of(scheduler)))
    for t, rates in asked:
        course.see(t, rates)
    return course.misfit


class Course:
    """The base rates of a run at ascending steps, and whether they came to an end before the run does.

    Args:
        name: the scheduler's.
        length: scheduler steps of the run.
        restarts: the rates rise again on purpose.
    """

    def __init__(self, name: str, length: float, *, restarts: bool = False) -> None:
        self._name, self._length, self._restarts = name, length, restarts
        self._end = length - max(_TOLERANCE * length, 1.0)
        self._peaks: list[float] = []
        self._level = 1.0  # the highest of the groups' rates, each as a part of the highest that it had
        self._high, self._fallen, self._low = 0.0, 0.0, -1.0
        self._ended: float | None = None
        self._risen: tuple[float, float] | None = None

    def see(self, t: float, rates: Sequence[float]) -> None:
        """Take the rates of all groups at step `t`."""
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
        """In what the rates do not fit the run, by those seen; empty if they do."""
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


# Where the curve has an end: cosine rises again after it, the others stand still, and OneCycleLR raises.
_ENDS = {
    torch_schedulers.CosineAnnealingLR: "T_max",
    torch_schedulers.OneCycleLR: "total_steps",
    torch_schedulers.PolynomialLR: "total_iters",
}
_RESTARTS = (torch_schedulers.CosineAnnealingWarmRestarts, torch_schedulers.CyclicLR)


def _stated_end(scheduler: Any) -> tuple[str, float] | None:
    """The name and the value of what a scheduler was given for its length."""
    if type(scheduler) in _ENDS:
        name = _ENDS[type(scheduler)]
        return name, float(getattr(scheduler, name))
    for function in getattr(scheduler, "lr_lambdas", ()):  # those of transformers are partial functions
        given = function.keywords if isinstance(function, partial) else {}
        if isinstance(length := given.get("num_training_steps"), int | float):
            return "num_training_steps", float(length)
    return None


def _decay(scheduler: Any) -> tuple[float, float] | None:
    """The factor on the rate, and the scheduler steps that each takes, of a schedule that multiplies for ever."""
    if type(scheduler) is torch_schedulers.StepLR:
        return scheduler.gamma, scheduler.step_size
    if type(scheduler) is torch_schedulers.ExponentialLR:
        return scheduler.gamma, 1.0
    return None


def _points(length: float, groups: int) -> list[int]:
    """Ascending steps of the run: all of a short one, and of a long one's beginning more than of the rest."""
    last = ceil(length) - 1
    count = max(64, min(_POINTS, 50_000 // max(1, groups)))
    if last < 2 * count:
        return list(range(last + 1))
    spread = {round(last * i / count) for i in range(count + 1)}
    return sorted(spread | {round(last / 32 * i / count) for i in range(count)})
