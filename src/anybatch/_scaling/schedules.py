"""A torch scheduler driven to floor(tau).

The scheduler is stepped `floor(tau_new) - floor(tau_old)` times: jumping its `last_epoch` is wrong for most schedulers,
because they are recursions.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from anybatch._errors import AnybatchWarning, InvalidValueError, UsageError
from anybatch._scaling.clock import Clock
from anybatch._scaling.fit import Course, misfit
from anybatch._scaling.preview import last_index, position_of
from anybatch._scaling.wrappers import HeldScheduler, bare_optimizer, held_by


class ScheduleDriver:
    """Keeps `scheduler` at `clock.iteration`.

    `ReduceLROnPlateau` runs on a metric, not on a clock: it is left alone, and its user steps it as ever.

    A schedule that ends before the run, and a learning rate that something else changes, each give one warning.

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
        self._limit = last_index(scheduler)
        self._course: Course | None = None  # of a schedule that could not be asked for its rates
        self._said = False
        self._ahead = position_of(scheduler) or 0  # of the clock, if this is no resumed run
        self.resume(offset=self._ahead - clock.count(every))
        self._unasked = bool(self._ahead)
        if not self._ahead:
            self._warn_of_misfit()
        self._stopped = False
        self._rates = _rates.setdefault(optimizer, _Rates())
        self._rates.join(self)
        self._unsubscribe = clock.subscribe(self._follow)

    @property
    def scheduler(self) -> Any:
        """The real one, which is driven."""
        return self._scheduler

    @property
    def driven(self) -> bool:
        """Whether the clock moves it; a metric moves `ReduceLROnPlateau`."""
        return self._driven

    @property
    def position(self) -> int:
        """Scheduler steps that it is at."""
        position = position_of(self._scheduler)
        return self._at if position is None else position

    def state(self) -> Mapping[str, Any]:
        """The scheduler's own state; empty where it has none."""
        state_dict = getattr(self._scheduler, "state_dict", None)
        return state_dict() if callable(state_dict) else {}

    def hold(self) -> None:
        """Let the wrapper that has the scheduler step it no more."""
        if self._holder is not None and self._driven:
            self._held = self._holder.scheduler = HeldScheduler(self._scheduler)

    def stop(self) -> None:
        """Leave the scheduler to whoever had it, and do nothing more."""
        self._stopped = True
        self._unsubscribe()
        self._rates.leave(self)
        if self._held is not None and self._holder.scheduler is self._held:
            self._holder.scheduler = self._scheduler

    def _misfit(self, *, offset: int) -> str | None:
        if self._clock.total is None or not self._driven:
            return ""
        return misfit(
            self._scheduler,
            length=offset + self._clock.total / self._every,
            optimizer=self.optimizer,
            jump=None if self._jump is None else getattr(self._jump, "__name__", ""),
        )

    def _warn_of_misfit(self) -> None:
        said = self._misfit(offset=self.offset)
        self._course = None
        if said is None and self._clock.total is not None:  # then its rates are looked at as they come
            name = type(self._scheduler).__name__
            self._course = Course(name, self.offset + self._clock.total / self._every)
        if said:
            self._say(said)

    def _say(self, said: str) -> None:
        if self._said:
            return
        self._said = True
        warnings.warn(
            f"The schedule does not fit total: {said}. Both are counted in base iterations, optimizer steps at the "
            "base batch: give the scheduler the run's length (T_max, total_iters, num_training_steps) as attach's "
            "total, not as len(loader) * epochs // accumulation of the larger batch. A scheduler that is stepped once "
            "an epoch needs attach(..., schedule_every='epoch').",
            AnybatchWarning,
            stacklevel=6,
        )

    def _look(self) -> None:
        """Look at the schedule once, at the first step: until then its state and the clock's may still be loaded."""
        if not self._unasked:
            return
        self._unasked = False
        ahead, self._ahead = self._ahead, 0
        if not ahead or self._clock.tau or self._clock.total is None or not self._driven:
            self._warn_of_misfit()
            return
        if self._misfit(offset=0):
            self._warn_of_misfit()  # silent where a new run takes over a schedule half way
            return
        warnings.warn(
            f"The schedule is ahead of the clock: attach found the scheduler at {ahead}, and the clock begins at 0, so "
            "the schedule ends before the run. In a resumed run, load the controller's state as well; in a new one, "
            "make a new scheduler.",
            AnybatchWarning,
            stacklevel=3,
        )

    def resume(self, *, offset: int) -> None:
        """Take the clock as it is now; `offset` is the scheduler's position at tau = 0."""
        self.offset = offset
        self._at = self._target()
        self._unasked = True
        if (rates := _rates.get(self.optimizer)) is not None:
            rates.forget()

    def catch_up(self) -> None:
        """Step the scheduler to where the clock is now."""
        if not self._stopped:
            self._follow(0.0)

    def check(self) -> None:
        """Raise if the scheduler is not where this driver left it.

        Raises:
            UsageError: somebody else steps it too, or its state was not restored together with the clock's.
        """
        if self._stopped:
            return
        self._look()
        if self._jump is not None:  # it cannot tell where it is: whatever a loop or a resume made of it, it is here now
            self._jump(self._at)
            self._rates.keep()
        position = position_of(self._scheduler)
        if self._driven and position is not None and position != self._at:
            raise UsageError(
                f"The scheduler is at {position}, the clock at {self._at}. anybatch steps the scheduler: remove "
                "scheduler.step() from the training loop. After a resume, load the scheduler's state as well as the "
                "controller's."
            )
        self._rates.check()
        if self._course is not None and (rates := _rates_of(self.optimizer)):
            self._course.see(self._at, rates)
            if said := self._course.misfit:
                self._course = None
                self._say(said)

    def _follow(self, _: float) -> None:
        target = self._target()
        if self._jump is not None:
            self._jump(target)
        elif self._driven:
            with _knowingly(self._scheduler):
                for _step in range(target - self._at):
                    self._scheduler.step()
        self._at = target
        self._rates.keep()

    def _target(self) -> int:
        return int(min(self.offset + self._clock.count(self._every), self._limit))


class _Rates:
    """The learning rates that the schedules of one optimizer left in its groups."""

    def __init__(self) -> None:
        self._drivers: WeakSet[ScheduleDriver] = WeakSet()
        self._left: list[tuple[dict[str, Any], float]] = []
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._said = False

    def join(self, driver: ScheduleDriver) -> None:
        """Take a driver; a first one begins anew."""
        if not self._drivers:
            self._said, self._optimizer = False, ref(driver.optimizer)
        self._drivers.add(driver)
        self.keep()

    def leave(self, driver: ScheduleDriver) -> None:
        """Drop a driver."""
        self._drivers.discard(driver)
        self.forget()

    def drivers(self) -> list[ScheduleDriver]:
        """Those that are not stopped."""
        return list(self._drivers)

    def forget(self) -> None:
        """The rates may be others: a state was loaded."""
        self._left.clear()

    def keep(self) -> None:
        """Note the rates as they are, unless a metric moves them as well."""
        optimizer = self._optimizer()
        self._left = []
        if optimizer is None or self._said or not all(driver.driven for driver in self._drivers):
            return
        self._left = list(zip(optimizer.param_groups, _rates_of(optimizer), strict=False))

    def check(self) -> None:
        """Warn once if a rate is not what it was left at."""
        optimizer = self._optimizer()
        if optimizer is None or not self._left or self._said:
            return
        # After a load_state_dict the groups are other dictionaries, with the rates of another moment.
        now = {id(group): rate for group, rate in zip(optimizer.param_groups, _rates_of(optimizer), strict=False)}
        changed = [(rate, now[id(group)]) for group, rate in self._left if now.get(id(group), rate) != rate]
        if not changed:
            return
        self._said = True
        before, after = changed[0]
        warnings.warn(
            f"The learning rate was changed from {before:.6g} to {after:.6g}, not by the scheduler that attach was "
            "given: another scheduler of this optimizer is stepped (SWALR, say), or group['lr'] is set. Both change "
            "the rate from now on. Give attach one schedule for the whole run, in base iterations: SequentialLR takes "
            "several, one after the other (docs/swa.md).",
            AnybatchWarning,
            stacklevel=3,
        )


_rates: WeakKeyDictionary[Optimizer, _Rates] = WeakKeyDictionary()


def drivers_of(optimizer: Optimizer) -> list[ScheduleDriver]:
    """The drivers of an optimizer's schedules."""
    rates = _rates.get(optimizer)
    return [] if rates is None else rates.drivers()


def _rates_of(optimizer: Optimizer) -> list[float]:
    """Each group's rate; empty where one is on a device, which a look at each step would wait for."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return []
    return [float(rate) for rate in rates]


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
