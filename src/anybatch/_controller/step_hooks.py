"""The order of one step: hooks on the user's own optimizer, before and after its `step()`.

[Note: one step] Before `step()` the window is read and reduced. Moments, gain and the rule's scaling follow from it,
and the optimizer's values are changed for this one call. After it they are restored. If the step really happened, the
averages are kept, and the clock advances with the schedule and every subscriber. Nothing is kept before the step has
happened, so a step that raises changes nothing. docs/architecture.md has a diagram.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch._controller.diagnostics import Diagnostics
from anybatch._controller.gain_estimator import GainEstimator, Step
from anybatch._controller.run_state import RunState
from anybatch._controller.settings import Settings
from anybatch._ema import warn_of_foreign_average
from anybatch._errors import UsageError
from anybatch._gradients import (
    Engine,
    GradientHooks,
    Handle,
    LayerNorms,
    Share,
    check_in_use,
    check_no_backward,
    check_not_captured,
    divisor_of,
    finite,
    is_phantom,
    reduce_window,
    trainable,
)
from anybatch._record import RecordSinks
from anybatch._scaling import Hyperparameters, ScheduleDriver

_SAME = 1e-6  # of the squared norm: the variance that rounding leaves of equal gradients in float32


@dataclass
class _Prepared:
    """A window and the step that follows from it.

    Args:
        stamp: Of the window; `None` where backwards are not counted.
        step: The step.
        used: Whether a step has begun with it.
    """

    stamp: int | None
    step: Step
    used: bool = False


class StepHooks:
    """Hooks on the steps of one optimizer, or of several that train one model.

    Args:
        settings: The settings of the run.
        model: The module that they train.
        given: The optimizers as passed to `attach`, for example a framework's wrappers around those of `values`.
        values: The hyperparameters of each optimizer in a step.
        estimator: Returns the scaling of a step from its norms.
        engine: One process, DDP or FSDP2.
        gradients: The hooks on backwards. `None` where nothing needs counting.
        drivers: The drivers that keep the schedules on the clock.
        run: The run's state.
        sinks: The sinks of the record.
        share: Under `Join`, the divisor of DDP where ranks have run out of data. Otherwise `None`.
        check: Raises before a step whose loop over the parts of a batch was left.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        model: nn.Module,
        given: Sequence[Optimizer],
        values: Sequence[Hyperparameters],
        estimator: GainEstimator,
        engine: Engine,
        gradients: GradientHooks | None,
        drivers: Sequence[ScheduleDriver],
        run: RunState,
        sinks: RecordSinks,
        share: Callable[[], Share | None],
        check: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._model = model
        self._values = values
        self._estimator = estimator
        self._engine = engine
        self._gradients = gradients
        self._drivers = drivers
        self._run = run
        self._sinks = sinks
        self._share = share
        self._check = check
        # The window after the steps of some optimizers and not of all: its stamp, and the factor on its loss.
        self._partial: tuple[int | None, Tensor | None] = None, None
        self._partial_window = 0
        self._pending: Step | None = None
        self._prepared: _Prepared | None = None
        driven = {id(driver.optimizer) for driver in drivers}
        undriven = [
            each
            for wrapper, value in zip(given, values, strict=True)
            for each in (wrapper, value.optimizer)
            if id(value.optimizer) not in driven
        ]
        self._diagnostics = Diagnostics(run=run, parameters=self._trainable, undriven=undriven)
        self._averages_checked = settings.batch.scale == 1  # at scale 1 an average by steps is right
        self._taken: dict[int, bool] = {}  # for each that stepped in this window, whether it skipped by itself
        self._lr = nan  # the first optimizer's in this window
        self.paused = False  # whether a step is the optimizer's own
        self._restore_values: Callable[[], None] | None = None
        self._handles: list[Handle] = []
        for index, each in enumerate(values):
            optimizer = each.optimizer
            self._handles += [
                *engine.steps.hook(optimizer, partial(self._before, index), partial(self._after, index)),
                optimizer.register_state_dict_pre_hook(lambda _: self.restore()),
                optimizer.register_load_state_dict_pre_hook(lambda *_: self.restore()),
            ]

    @property
    def lr(self) -> float:
        """The first group's present learning rate."""
        return float(self._values[0].optimizer.param_groups[0]["lr"])

    def restore(self) -> None:
        """Restore the base values; after a step that raised, at the next call."""
        restore, self._restore_values = self._restore_values, None
        if restore is not None:
            restore()

    def forget(self) -> None:
        """Drop the open window, since a state was loaded."""
        self._prepared = None
        self._taken.clear()

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def peek(self) -> Step | None:
        """The step that would follow now; `None` without a backward since the last step."""
        if self._gradients is not None and not self._gradients.pending and self._engine.ranks.group is None:
            return None
        prepared = self._prepare_window(self._values[0].optimizer)
        return None if prepared is None or prepared.step.count == 0 else prepared.step

    def mean_gradients(self) -> None:
        """Make `.grad` the mean, once a window."""
        if self._gradients is not None and self._gradients.pending and self._settings.reduction != "mean":
            prepared = self._prepare_window(self._values[0].optimizer)
            if prepared is not None:
                self._use(prepared, ahead=True)

    # ---- before ----

    def _before(self, index: int, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.restore()
        self._pending = None
        if self.paused:
            return None
        for p in trainable(self._values[index].optimizer)[:1]:  # a group may be empty
            check_not_captured(p)
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            self._prepare(index)
            return None

        def closure_then_prepare() -> Any:  # this hook runs before the closure's backward, the scaling after it
            loss = closure()
            self.restore()
            self._prepare(index)
            return loss

        if len(args) < 2:
            return args, {**kwargs, "closure": closure_then_prepare}
        return (args[0], closure_then_prepare, *args[2:]), kwargs

    def _prepare(self, index: int) -> None:
        """Change the values of one optimizer for its step."""
        values = self._values[index]
        if self._taken and self._prepared is not None:
            if self._backed_off():
                self._count(self._prepared.step, skipped=True)
            elif self._gradients is not None and self._gradients.windows != self._partial_window:
                self._diagnostics.once(
                    "Some optimizers of a controller stepped, and then the gradients were cleared before the others "
                    "did: this step does not count. Call step() of each after the last backward."
                )
                self._count(self._prepared.step, skipped=True)
        self._check_turn(index)
        prepared = self._prepared if self._taken else self._prepare_window(values.optimizer)
        if prepared is None:
            return
        self._use(prepared)
        step = self._pending = prepared.step
        held = ExitStack()
        self._restore_values = held.close
        if step.skipped:
            held.enter_context(self._engine.steps.withheld(values.optimizer))
            held.enter_context(values.uncounted())
            return
        scaling = step.scaling if index == 0 else self._estimator.scaling(step, exponent=values.exponent)
        factors = [
            scaling.lr_factor
            if same
            else self._estimator.scaling(step, exponent=partial(values.exponent, group=i)).lr_factor
            for i, same in enumerate(values.same_law)
        ]
        held.enter_context(values.scaled(lr_factor=factors, iterations=scaling.iterations, scale=step.scale))

    def _check_turn(self, index: int) -> None:
        """Raise if this optimizer steps out of turn: a window is one step of each, after its last backward."""
        name = type(self._values[index].optimizer).__name__
        if index in self._taken:
            raise UsageError(
                f"{name} steps again, and another optimizer of the same controller has not stepped yet: call each "
                "step() once, after the last backward of the window."
            )
        if self._taken and self._prepared is not None and self._prepared.stamp != self._stamp:
            raise UsageError(
                "There was a backward between the steps of two optimizers of the same controller, before that of "
                f"{name}: call each step() once, after the last backward of the window. Two that train against each "
                "other, as in a GAN, need a controller each."
            )

    @property
    def _stamp(self) -> int | None:
        """The stamp of the open window; `None` where backwards are not counted."""
        return None if self._gradients is None else self._gradients.stamp

    def _prepare_window(self, optimizer: Optimizer) -> _Prepared | None:
        """The step of this window's gradients; `None` where it is not a step of training."""
        gradients = self._gradients
        if gradients is not None:
            check_no_backward()
            if gradients.follow() and any(p.grad is not None for p in self._trainable()):
                gradients.assume()
        emptied = gradients is not None and self._empty(gradients)
        seen = gradients is not None and gradients.pending
        if not seen and not emptied and is_phantom(optimizer, counted=gradients is not None):
            return None
        self._diagnostics.before()
        if not self._averages_checked:
            self._averages_checked = True
            warn_of_foreign_average(self._model)
        for driver in self._drivers:
            driver.check()
        self._check()
        share = self._share()
        if gradients is not None:
            self._engine.check(share is not None)
            gradients.check_joined(joined=share is not None)
            if not gradients.pending:
                check_in_use(optimizer, model=self._model)
        stamp = self._stamp
        if stamp is None or self._prepared is None or self._prepared.stamp != stamp:
            step = self._step_of_window(share, optimizer)
            whole = self._engine.ranks.model == 1  # else one rank sees a part of the gradient
            fixed = self._settings.measurement is None and not step.skipped and whole
            if fixed and not finite(self._trainable(), step=self._run.steps):
                step = self._estimator.not_finite(step)
            self._prepared = _Prepared(stamp, step)
        # Otherwise it is the same window: after peek(), a step() that raised, or in a step() that calls another one.
        return self._prepared

    def _use(self, prepared: _Prepared, *, ahead: bool = False) -> None:
        """Make `.grad` the mean of the gradients, once a window; `peek()` does not do this."""
        if prepared.used:
            return
        prepared.used = True
        gradients, reduction = self._gradients, self._settings.reduction
        if gradients is None:
            return
        gradients.sizes.check(gradients.pending)
        if reduction == "mean":
            return
        # Micro-batches of a rank on average, without empty ones; in Join, where some ranks have none left, its own.
        count = prepared.step.count / self._engine.ranks.size if self._share() is None else gradients.pending
        if count not in (0, divisor := divisor_of(reduction, count)):
            if not ahead and self._settings.grad_scaler is None and gradients.changed():
                self._diagnostics.once(
                    "The gradients were changed between the last backward and the step, as clip_grad_norm_ does, while "
                    f"they were a sum (reduction={reduction!r}): the clip then depends on the accumulation. Call "
                    "controller.mean_gradients() before the clip."
                )
            gradients.average(count / divisor)

    def _trainable(self) -> list[Tensor]:
        members = self._engine.steps.members([each.optimizer for each in self._values])
        return [p for p in members if p.requires_grad]

    def _empty(self, gradients: GradientHooks) -> bool:
        """Drop a window whose gradients were cleared before the step."""
        if not gradients.emptied():
            return False
        gradients.close()
        self._diagnostics.once(
            "The gradients were cleared between the last backward and optimizer.step(): the step does not count, and "
            "the clock does not advance. Call optimizer.zero_grad() after the step, not before it."
        )
        return True

    def _step_of_window(self, share: Share | None, optimizer: Optimizer) -> Step:
        """The step, from the gradients of all ranks."""
        running = self._run.running
        if self._gradients is None:
            return self._estimator.step(running, None)
        window, ranks = self._gradients.window(), self._engine.ranks
        if window.backwards == 0 and ranks.group is None:
            return self._estimator.nothing(running)
        if self._gradients.measured_by(LayerNorms.name) and window.backwards * ranks.size == 1:
            self._diagnostics.once(
                "One gradient a step shows no noise, so there is none by layer either: accumulate over two or more "
                "backwards, or split the batch with anybatch.split(batch, 2)."
            )
        checksum = 0 if ranks.group is None else self._run.checksum(*self._rates(), *self._positions())
        reduction = self._settings.reduction
        skips = self._engine.steps.found_inf(optimizer)
        seen = reduce_window(window, ranks=ranks, reduction=reduction, checksum=checksum, share=share, skips=skips)
        self._engine.steps.read = seen.skips
        step = self._estimator.step(running, seen)
        if ranks.group is not None and step.raw.sqnorm > 0 and abs(step.raw.variance) <= _SAME * step.raw.sqnorm:
            self._diagnostics.once(
                f"The gradients of all {step.count} micro-batches of a step are equal, so the gain is 1. Does every "
                "rank see the same examples? Give each its own, by a DistributedSampler for example."
            )
        return step

    def _rates(self) -> list[float]:
        """The base learning rate of every group, except for those on a device, where a read synchronises."""
        rates = [group["lr"] for each in self._values for group in each.optimizer.param_groups]
        return [float(lr) for lr in rates if not isinstance(lr, Tensor) or lr.device.type == "cpu"]

    def _positions(self) -> list[float]:
        return [float(driver.position) for driver in self._drivers]

    # ---- after ----

    def _after(self, index: int, optimizer: Optimizer, _: tuple[Any, ...], __: dict[str, Any]) -> None:
        step, self._pending = self._pending, None
        if step is None:
            return
        if index == 0 and self._sinks.writes:
            self._lr = self.lr
        self.restore()
        self._taken[index] = self._engine.steps.skipped(optimizer)
        if len(self._taken) < len(self._values):
            self._partial = self._stamp, self._factor()
            self._partial_window = 0 if self._gradients is None else self._gradients.windows
            return
        skipped = step.skipped or any(self._taken.values())
        if self._gradients is not None:
            self._gradients.close(forget=skipped)
        self._count(step, skipped=skipped)

    def _factor(self) -> Tensor | None:
        """The factor on the window's loss, which Lightning and Accelerate may change after each optimizer."""
        if self._gradients is not None and self._gradients.loss_scale is not None:
            return self._gradients.loss_scale
        scale = self._settings.loss_scale()
        return None if scale is None else scale.clone()  # the scaler changes its own tensor in place

    def _backed_off(self) -> bool:
        """Whether a GradScaler has lowered its factor since an earlier window.

        Then the gradients of an optimizer without a step in that window were not finite, and it takes none. The scaler
        skips each optimizer separately; a step of the run is all of them or none.
        """
        stamp, before = self._partial
        if stamp is not None and stamp == self._stamp:
            return False
        scale = self._settings.loss_scale()
        return scale is not None and before is not None and bool(scale < before)

    def _count(self, step: Step, *, skipped: bool) -> None:
        """Add the step to the run, after the last optimizer that takes it."""
        self._taken.clear()
        try:
            self._run.add(step, skipped=skipped)
        finally:  # the step has happened, even if a subscriber of the clock raises
            if self._sinks.writes:
                self._sinks.step(self._run.line(step, lr=self._lr, skipped=skipped))
                if self._run.clock.total is not None and self._run.clock.done:
                    self._sinks.rest()
        self._diagnostics.after(step, skipped=skipped)
