"""A torch scheduler driven to floor(tau).

The scheduler is stepped `floor(tau_new) - floor(tau_old)` times: jumping its `last_epoch` is wrong for most schedulers,
because they are recursions.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from anybatch._errors import AnybatchWarning, InvalidValueError, UsageError
from anybatch._scaling.clock import Clock
from anybatch._scaling.fit import misfit
from anybatch._scaling.wrappers import HeldScheduler, bare_optimizer, held_by


class ScheduleDriver:
    """Keeps `scheduler` at `clock.iteration`.

    `ReduceLROnPlateau` runs on a metric, not on a clock: it is left alone, and its user steps it as ever.

    Args:
        scheduler: any scheduler of `torch.optim.lr_scheduler`, an object with `step()` and `last_epoch`, one of timm's,
            or a framework's wrapper around one.
        optimizer: the optimizer that it must belong to.
        clock: what drives it.
        every: base iterations of one scheduler step.
    """

    def __init__(self, scheduler: Any, *, optimizer: Optimizer, clock: Clock, every: float = 1.0) -> None:
        scheduler, self._holder = held_by(scheduler)
        self._held: HeldScheduler | None = None
        if bare_optimizer(getattr(scheduler, "optimizer", optimizer)) is not optimizer:
            raise InvalidValueError(
                "The scheduler belongs to another optimizer than the one given to attach: make it of that optimizer."
            )
        if not callable(getattr(scheduler, "step", None)):
            raise InvalidValueError(f"scheduler must have a step() method, got {type(scheduler).__name__}.")
        self.optimizer = optimizer
        self._scheduler = scheduler
        self._clock = clock
        self._every = every
        self._driven = not isinstance(scheduler, ReduceLROnPlateau)
        self._jump = _jump_of(scheduler, every=every)
        if self._driven and self._jump is None:
            _check_steps_alone(scheduler)
        self._limit = _last_index(scheduler)
        self._ahead = position_of(scheduler) or 0  # of the clock, if this is no resumed run
        self.resume(offset=self._ahead)
        if not self._ahead:
            self._warn_of_misfit()
        self._unsubscribe = clock.subscribe(self._follow)

    @property
    def position(self) -> int:
        """How many scheduler steps the schedule is at."""
        return self._at

    def state(self) -> Mapping[str, Any]:
        """The scheduler's own state; empty where it has none."""
        state_dict = getattr(self._scheduler, "state_dict", None)
        return state_dict() if callable(state_dict) else {}

    def hold(self) -> None:
        """Let the wrapper that has the scheduler step it no more."""
        if self._holder is not None and self._driven:
            self._held = self._holder.scheduler = HeldScheduler(self._scheduler)

    def stop(self) -> None:
        """Leave the scheduler to whoever had it."""
        self._unsubscribe()
        if self._held is not None and self._holder.scheduler is self._held:
            self._holder.scheduler = self._scheduler

    def _warn_of_misfit(self) -> bool:
        if self._clock.total is None:
            return False
        said = misfit(self._scheduler, length=self.offset + self._clock.total / self._every)
        if said:
            warnings.warn(
                f"The schedule does not fit total: {said}. Both are counted in base iterations, optimizer steps at the "
                "base batch; a scheduler that is stepped once an epoch needs attach(..., schedule_every='epoch').",
                AnybatchWarning,
                stacklevel=5,
            )
        return bool(said)

    def _warn_if_ahead(self) -> None:
        """Once, at the first step: until then the clock's state may still be loaded."""
        ahead, self._ahead = self._ahead, 0
        if not ahead or not self._driven or self._clock.total is None or self._warn_of_misfit() or self._clock.tau:
            return
        warnings.warn(
            f"The schedule is ahead of the clock: attach found the scheduler at {ahead}, and the clock begins at 0, so "
            "the schedule ends before the run. In a resumed run, load the controller's state as well; in a new one, "
            "make a new scheduler.",
            AnybatchWarning,
            stacklevel=2,
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
        self._warn_if_ahead()
        if self._jump is not None:  # it cannot tell where it is: whatever a loop or a resume made of it, it is here now
            self._jump(self._at)
        position = position_of(self._scheduler)
        if self._driven and position is not None and position != self._at:
            raise UsageError(
                f"The scheduler is at {position}, the clock at {self._at}. anybatch steps the scheduler: remove "
                "scheduler.step() from the training loop. After a resume, load the scheduler's state as well as the "
                "controller's."
            )

    def _follow(self, _: float) -> None:
        target = self._target()
        if self._jump is not None:
            self._jump(target)
        elif self._driven:
            with _knowingly(self._scheduler):
                for _step in range(target - self._at):
                    self._scheduler.step()
        self._at = target

    def _target(self) -> int:
        return int(min(self.offset + self._clock.count(self._every), self._limit))


@contextmanager
def _knowingly(scheduler: Any) -> Iterator[None]:
    """At its first step torch asks whether optimizer.step is the one it saw; with a loss scale Accelerate's is not."""
    if getattr(scheduler, "_step_count", 0) != 1:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Seems like `optimizer.step.*overridden", UserWarning)
        yield


def _jump_of(scheduler: Any, *, every: float) -> Callable[[int], object] | None:
    """What takes a scheduler of timm's kind to a position; `None` for one that is stepped and tells where it is.

    Raises:
        InvalidValueError: it tells no position, and takes none; or it counts epochs, and nobody said how long they are.
    """
    if position_of(scheduler) is not None:
        return None
    jump: Callable[[int], object] | None = getattr(scheduler, "step_update", None)
    if jump is None:
        raise InvalidValueError(
            f"{type(scheduler).__name__} does not tell its position (last_epoch, as torch's schedulers have it), and "
            "takes none (step_update, as timm's do): anybatch could not see who else steps it. Leave it out of attach, "
            "and set its values yourself from controller.clock."
        )
    if not getattr(scheduler, "t_in_epochs", False):
        return jump
    if every == 1:
        raise InvalidValueError(
            f"{type(scheduler).__name__} counts epochs: say how long one is, attach(..., schedule_every='epoch'), or "
            "make it with t_in_epochs=False."
        )
    by_epoch: Callable[[int], object] = scheduler.step
    return by_epoch


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
