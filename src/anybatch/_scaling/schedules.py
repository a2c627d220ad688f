"""A torch scheduler driven to floor(tau).

The scheduler is stepped `floor(tau_new) - floor(tau_old)` times: jumping its `last_epoch` is wrong for most schedulers,
because they are recursions.
"""

import inspect
import warnings
from math import inf
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from anybatch._errors import AnybatchWarning, InvalidValueError, UsageError
from anybatch._scaling.clock import Clock
from anybatch._scaling.fit import misfit


class ScheduleDriver:
    """Keeps `scheduler` at `clock.iteration`.

    `ReduceLROnPlateau` runs on a metric, not on a clock: it is left alone, and its user steps it as ever.

    Args:
        scheduler: any scheduler of `torch.optim.lr_scheduler`, or an object with `step()` and `last_epoch`.
        optimizer: the optimizer that it must belong to.
        clock: what drives it.
        every: base iterations of one scheduler step.
    """

    def __init__(self, scheduler: Any, *, optimizer: Optimizer, clock: Clock, every: float = 1.0) -> None:
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise InvalidValueError("The scheduler belongs to another optimizer than the one given to attach.")
        if not callable(getattr(scheduler, "step", None)):
            raise InvalidValueError(f"scheduler must have a step() method, got {type(scheduler).__name__}.")
        self.optimizer = optimizer
        self._scheduler = scheduler
        self._clock = clock
        self._every = every
        self._driven = not isinstance(scheduler, ReduceLROnPlateau)
        if self._driven:
            _check_steps_alone(scheduler)
        self._limit = _last_index(scheduler)
        self.resume(offset=position_of(scheduler) or 0)
        if clock.total is not None:
            self._warn_of_misfit(self.offset + clock.total / every)
        self.stop = clock.subscribe(self._follow)

    def _warn_of_misfit(self, length: float) -> None:
        said = misfit(self._scheduler, length=length)
        if said:
            warnings.warn(
                f"The schedule does not fit total: {said}. Both are counted in base iterations, optimizer steps at the "
                "base batch; a scheduler that is stepped once an epoch needs attach(..., schedule_every='epoch').",
                AnybatchWarning,
                stacklevel=5,
            )

    def resume(self, *, offset: int) -> None:
        """Take the clock as it is now; `offset` is the scheduler's position at tau = 0."""
        self.offset = offset
        self._at = self._target()

    def catch_up(self) -> None:
        """Step the scheduler to where the clock is now."""
        self._follow(0.0)

    def check(self) -> None:
        """Raise if the scheduler is not where this driver left it.

        Raises:
            UsageError: somebody else steps it too, or its state was not restored together with the clock's.
        """
        position = position_of(self._scheduler)
        if self._driven and position is not None and position != self._at:
            raise UsageError(
                f"The scheduler is at {position}, the clock at {self._at}. anybatch steps the scheduler: remove "
                "scheduler.step() from the training loop. After a resume, load the scheduler's state as well as the "
                "controller's."
            )

    def _follow(self, _: float) -> None:
        target = self._target()
        if self._driven:
            for _step in range(target - self._at):
                self._scheduler.step()
        self._at = target

    def _target(self) -> int:
        return int(min(self.offset + self._clock.count(self._every), self._limit))


def _check_steps_alone(scheduler: Any) -> None:
    """Raise if `scheduler.step()` wants an argument."""
    try:
        signature = inspect.signature(scheduler.step)
    except ValueError:  # a callable that tells nothing of itself
        return
    try:
        signature.bind()
    except TypeError:
        raise InvalidValueError(
            f"{type(scheduler).__name__}.step{signature} wants an argument, and the clock has none to give: pass a "
            "scheduler whose step() takes none, or leave it out of attach and step it yourself."
        ) from None


def position_of(scheduler: Any) -> int | None:
    """How often it was stepped; `None` where it does not tell."""
    if isinstance(scheduler, ChainedScheduler):
        return position_of(scheduler._schedulers[0])
    position = getattr(scheduler, "last_epoch", None)
    return position if isinstance(position, int) else None


def _last_index(scheduler: Any) -> float:
    """The last index a scheduler can be at: OneCycleLR raises beyond its end."""
    if isinstance(scheduler, OneCycleLR):
        return scheduler.total_steps - 1
    if isinstance(scheduler, ChainedScheduler):
        return min(_last_index(inner) for inner in scheduler._schedulers)
    if isinstance(scheduler, SequentialLR):
        return scheduler._milestones[-1] + _last_index(scheduler._schedulers[-1])
    return inf
