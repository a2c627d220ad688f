"""A scheduler that follows the clock to floor(tau).

It is stepped `floor(tau_new) - floor(tau_old)` times. Setting its `last_epoch` is wrong for most schedulers, which are
recursions.
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

    A metric drives `ReduceLROnPlateau`: its user steps it. A schedule that ends before the run gives one warning. So
    does a learning rate that something else changes.

    Args:
        scheduler: any scheduler of `torch.optim.lr_scheduler`, an object with `step()` and `last_epoch`, one of timm's,
            or a framework's wrapper around one.
        optimizer: the scheduler's own.
        clock: the clock to follow.
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
        self.scheduler = scheduler  # the real one
        self.driven = not isinstance(scheduler, ReduceLROnPlateau)
        self._clock = clock
        self._every = every
        self._jump = _jump_of(scheduler, every=every)
        if self.driven and self._jump is None:
            _check_step_signature(scheduler)
        self._limit = last_index(scheduler)
        self._rates = _rates.setdefault(optimizer, _Rates(ref(optimizer)))
        self._course: Course | None = None  # of a schedule whose rates are not known in advance
        self._warned = self._stopped = False
        self._ahead = position_of(scheduler) or 0  # of the clock, unless the run is resumed
        self.resume(offset=self._ahead - clock.count(every))
        self._unchecked = bool(self._ahead)
        if not self._ahead:
            self._check_fit()
        self._rates.join(self)
        self._unsubscribe = clock.subscribe(self._follow)

    @property
    def position(self) -> int:
        """The scheduler's position, in its steps."""
        position = position_of(self.scheduler)
        return self._at if position is None else position

    def state(self) -> Mapping[str, Any]:
        """The scheduler's own state; empty where it has none."""
        state_dict = getattr(self.scheduler, "state_dict", None)
        return state_dict() if callable(state_dict) else {}

    def hold(self) -> None:
        """Stop the wrapper around the scheduler from stepping it."""
        if self._holder is not None and self.driven:
            self._held = self._holder.scheduler = HeldScheduler(self.scheduler)

    def stop(self) -> None:
        """Give the scheduler back to its wrapper, and stop following the clock."""
        self._stopped = True
        self._unsubscribe()
        self._rates.drivers.discard(self)
        self._rates.forget()
        if self._held is not None and self._holder.scheduler is self._held:
            self._holder.scheduler = self.scheduler

    def _misfit(self, length: float) -> str | None:
        jump = None if self._jump is None else getattr(self._jump, "__name__", "")
        return misfit(self.scheduler, length=length, optimizer=self.optimizer, jump=jump)

    def _check_fit(self) -> None:
        self._course = None
        if self._clock.total is None:
            return
        length = self.offset + self._clock.total / self._every
        found = self._misfit(length) if self.driven else ""
        if found is None:  # the rates are then checked step by step
            self._course = Course(type(self.scheduler).__name__, length)
        elif found:
            self._warn(found)

    def _warn(self, misfit: str) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"The schedule does not fit total: {misfit}. Both are counted in base iterations, optimizer steps at the "
            "base batch: set the scheduler's length (T_max, total_iters, num_training_steps) to attach's total, not to "
            "len(loader) * epochs // accumulation of the larger batch. A scheduler that is stepped once an epoch needs "
            "attach(..., schedule_every='epoch').",
            AnybatchWarning,
            stacklevel=6,
        )

    def _check_start(self) -> None:
        """Check the schedule once, at the first step: before it, its state and the clock's may still be loaded."""
        if not self._unchecked:
            return
        self._unchecked = False
        ahead, self._ahead, total = self._ahead, 0, self._clock.total
        if not ahead or self._clock.tau or total is None or not self.driven or self._misfit(total / self._every):
            self._check_fit()  # no warning where a new run continues a schedule half way
            return
        warnings.warn(
            f"The schedule is ahead of the clock: attach found the scheduler at {ahead}, and the clock begins at 0, so "
            "the schedule ends before the run. In a resumed run, load the controller's state as well; in a new one, "
            "make a new scheduler.",
            AnybatchWarning,
            stacklevel=3,
        )

    def resume(self, *, offset: int) -> None:
        """Continue from the clock's present tau; `offset` is the scheduler's position at tau = 0."""
        self.offset = offset
        self._at = self._target()
        self._unchecked = True
        self._rates.forget()

    def catch_up(self) -> None:
        """Step the scheduler to the clock's present tau."""
        if not self._stopped:
            self._follow(0.0)

    def check(self) -> None:
        """Raise if the scheduler is not where this driver left it.

        Raises:
            UsageError: other code steps the scheduler too, or its state was not restored together with the clock's.
        """
        if self._stopped:
            return
        self._check_start()
        if self._jump is not None:  # its position is unknown, so it is set, whatever a loop or a resume has changed
            self._jump(self._at)
            self._rates.keep()
        position = position_of(self.scheduler)
        if self.driven and position is not None and position != self._at:
            raise UsageError(
                f"The scheduler is at {position}, the clock at {self._at}. anybatch steps the scheduler: remove "
                "scheduler.step() from the training loop. After a resume, load the scheduler's state as well as the "
                "controller's."
            )
        self._rates.check()
        if self._course is not None and (rates := _rates_of(self.optimizer)):
            self._course.see(self._at, rates)
            if found := self._course.misfit:
                self._course = None
                self._warn(found)

    def _follow(self, _: float) -> None:
        target = self._target()
        if self._jump is not None:
            self._jump(target)
        elif self.driven:
            with _without_order_warning(self.scheduler):
                for _step in range(target - self._at):
                    self.scheduler.step()
        self._at = target
        self._rates.keep()

    def _target(self) -> int:
        return int(min(self.offset + self._clock.count(self._every), self._limit))


class _Rates:
    """The learning rates that the schedules of one optimizer left in its groups."""

    def __init__(self, optimizer: Callable[[], Optimizer | None]) -> None:
        self.drivers: WeakSet[ScheduleDriver] = WeakSet()  # not stopped
        self._optimizer = optimizer  # weak: it is the key of this value
        self._left: list[tuple[dict[str, Any], float]] = []
        self._warned = False

    def join(self, driver: ScheduleDriver) -> None:
        """Add a driver; with the first one, warn again."""
        if not self.drivers:
            self._warned = False
        self.drivers.add(driver)
        self.keep()

    def forget(self) -> None:
        """Forget the rates, which a loaded state may change."""
        self._left = []

    def keep(self) -> None:
        """Keep the present rates, unless a metric changes them too."""
        optimizer = self._optimizer()
        self._left = []
        if optimizer is not None and not self._warned and all(driver.driven for driver in self.drivers):
            self._left = list(zip(optimizer.param_groups, _rates_of(optimizer), strict=False))

    def check(self) -> None:
        """Warn once if a rate is not the one that was kept."""
        optimizer = self._optimizer()
        if optimizer is None or not self._left or self._warned:
            return
        # After a load_state_dict the groups are other dictionaries, with the rates of another moment.
        now = {id(group): rate for group, rate in zip(optimizer.param_groups, _rates_of(optimizer), strict=False)}
        changed = [(rate, now[id(group)]) for group, rate in self._left if now.get(id(group), rate) != rate]
        if not changed:
            return
        self._warned = True
        before, after = changed[0]
        warnings.warn(
            f"The learning rate was changed from {before:.6g} to {after:.6g}, not by the scheduler given to attach: "
            "another scheduler of this optimizer is stepped (such as SWALR), or group['lr'] is set. Both change the "
            "rate from now on. Give attach one schedule for the whole run, in base iterations: SequentialLR joins "
            "several (docs/swa.md).",
            AnybatchWarning,
            stacklevel=3,
        )


_rates: WeakKeyDictionary[Optimizer, _Rates] = WeakKeyDictionary()


def drivers_of(optimizer: Optimizer) -> list[ScheduleDriver]:
    """The drivers of an optimizer's schedules."""
    return list(_rates[optimizer].drivers) if optimizer in _rates else []


def _rates_of(optimizer: Optimizer) -> list[float]:
    """Each group's rate; empty where one is on a device, as a read at each step would synchronise."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return []
    return [float(rate) for rate in rates]


@contextmanager
def _without_order_warning(scheduler: Any) -> Iterator[None]:
    """At its first step torch warns if optimizer.step was replaced; with a loss scale Accelerate replaces it."""
    if getattr(scheduler, "_step_count", 0) != 1:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Seems like `optimizer.step.*overridden", UserWarning)
        yield


def _jump_of(scheduler: Any, *, every: float) -> Callable[[int], object] | None:
    """The method that sets a scheduler of timm's kind to a position; `None` for a scheduler with `last_epoch`.

    Raises:
        InvalidValueError: its position can be neither read nor set; or it counts epochs, and their length is not given.
    """
    if position_of(scheduler) is not None:
        return None
    jump: Callable[[int], object] | None = getattr(scheduler, "step_update", None)
    if jump is None:
        raise InvalidValueError(
            f"{type(scheduler).__name__} has no last_epoch, as torch's schedulers have, and no step_update, as timm's "
            "have: its position can be neither read nor set. Leave it out of attach, and set its values yourself from "
            "controller.clock."
        )
    if not getattr(scheduler, "t_in_epochs", False):
        return jump
    if every == 1:
        raise InvalidValueError(
            f"{type(scheduler).__name__} counts epochs: state the length of one, attach(..., schedule_every='epoch'), "
            "or make it with t_in_epochs=False."
        )
    by_epoch: Callable[[int], object] = scheduler.step
    return by_epoch


def _check_step_signature(scheduler: Any) -> None:
    """Raise if `scheduler.step()` needs an argument."""
    try:
        signature = inspect.signature(scheduler.step)
        signature.bind()
    except ValueError:  # a callable without a signature
        return
    except TypeError:
        raise InvalidValueError(
            f"{type(scheduler).__name__}.step{signature} needs an argument, and the clock has none: pass a scheduler "
            "whose step() needs none, or leave it out of attach and step it yourself."
        ) from None
