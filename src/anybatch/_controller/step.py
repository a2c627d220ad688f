"""The order of one step: hooks on the user's own optimizer, before and after its `step()`.

[Note: one step] Before `step()`: the window is read and reduced, moments and gain follow, the rule gives the scaling,
and the optimizer's values are changed for this one call. After it: they are put back, and, if the step really happened,
the averages are kept, the clock moves, and with it the schedule and every subscriber. Nothing is kept before the step
has happened, so a step that raises leaves no trace. docs/architecture.md draws it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from anybatch._controller.complaints import Complaints
from anybatch._controller.judge import Judge, Step
from anybatch._controller.tally import Tally
from anybatch._errors import UsageError
from anybatch._gradients import (
    Engine,
    Flight,
    Gather,
    Observation,
    Reduction,
    Share,
    check_in_use,
    check_no_backward,
    check_not_captured,
    divisor_of,
    is_phantom,
    launch,
    trainable,
    withheld,
)
from anybatch._maps import check_base
from anybatch._record import Logbook
from anybatch._scaling import Hyperparameters, Moments, ScheduleDriver


@dataclass
class _Judged:
    """A window and what was made of it.

    Args:
        stamp: of the window; `None` where nothing watches one.
        step: how far it may go.
        flight: lagged, the reduction of its own numbers.
        used: whether a step has begun with it.
    """

    stamp: int | None
    step: Step
    flight: Flight | None
    used: bool = False


class Stepper:
    """Takes an optimizer, or several that train one model, through their steps.

    Args:
        model: what they train.
        given: the optimizers as attach got them: a framework's wrappers, say, around those of `values`.
        values: what becomes of each optimizer's hyperparameters in a step.
        judge: from what a step showed to how far it may go.
        engine: one process, DDP or FSDP2.
        gather: what watches the backwards; `None` where nothing needs counting.
        drivers: keep the schedules on the clock.
        tally: what the run has come to.
        logbook: where steps are written to.
        reduction: what `.grad` is at the step.
        lagged: whether a step is judged by the step before.
        patience: steps in a row that may not count.
        share: under `Join`, how DDP divides the gradients of fewer ranks; else `None`.
        loss_scale: gives the factor on the loss, a tensor of shape `[]`, or `None` where there is none.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        given: Sequence[Optimizer],
        values: Sequence[Hyperparameters],
        judge: Judge,
        engine: Engine,
        gather: Gather | None,
        drivers: Sequence[ScheduleDriver],
        tally: Tally,
        logbook: Logbook,
        reduction: Reduction,
        lagged: bool,
        patience: int,
        share: Callable[[], Share | None],
        loss_scale: Callable[[], Tensor | None],
    ) -> None:
        self._model = model
        self._values = values
        self._judge = judge
        self._engine = engine
        self._gather = gather
        self._drivers = drivers
        self._tally = tally
        self._logbook = logbook
        self._reduction: Reduction = reduction
        self._lagged = lagged
        self._share = share
        self._loss_scale = loss_scale
        # The window that some optimizers have stepped by, and not all: its stamp, and the factor on its loss.
        self._partial: tuple[int | None, Tensor | None] = None, None
        self._pending: Step | None = None
        self._flight: tuple[Flight, float] | None = None  # with tau as its gradients were taken
        self._landed: Moments | None = None
        self._landed_layers: Mapping[str, Moments] = {}
        self._inverse_size: float | None = None
        self._judged: _Judged | None = None
        driven = {id(driver.optimizer) for driver in drivers}
        undriven = [
            each
            for wrapper, value in zip(given, values, strict=True)
            for each in (wrapper, value.optimizer)
            if id(value.optimizer) not in driven
        ]
        self._complaints = Complaints(tally=tally, patience=patience, parameters=self._trainable, undriven=undriven)
        self._taken: dict[int, bool] = {}  # of those that stepped in this window, whether one skipped by itself
        self._lr = nan  # as the first of them had it in this window
        self._restore_values: Callable[[], None] | None = None
        self._handles: list[RemovableHandle] = []
        for index, each in enumerate(values):
            optimizer = each.optimizer
            self._handles += [
                # A compiled step must not trace these: it would bake in the first gain, or apply none at all.
                optimizer.register_step_pre_hook(torch.compiler.disable(partial(self._before, index))),
                optimizer.register_step_post_hook(torch.compiler.disable(partial(self._after, index))),
                optimizer.register_state_dict_pre_hook(lambda _: self.restore()),
                optimizer.register_load_state_dict_pre_hook(lambda *_: self.restore()),
            ]

    @property
    def lr(self) -> float:
        """The first group's learning rate as it is now."""
        return float(self._values[0].optimizer.param_groups[0]["lr"])

    def restore(self) -> None:
        """Put the base values back; after a step that raised, at the next opportunity."""
        restore, self._restore_values = self._restore_values, None
        if restore is not None:
            restore()

    def due(self) -> bool:
        """Whether the coming step is to be measured."""
        if self._judge.in_turn(self._tally.steps):
            return True
        # What is under way may be a sample, and a state_dict() since then, on one rank say, has folded it in already:
        # neither may change which steps are measured.
        if self._flight is not None and self._flight[0].window.samples_square is not None:
            self.land()
        return self._judge.overdue(self._tally.known)

    def land(self) -> None:
        """Fold what is still under way from the last step, lagged, into the averages, and keep it for the record."""
        if self._flight is None:
            return
        (flight, tau), self._flight = self._flight, None
        seen = flight.land()
        self._note_sizes(seen)
        self._landed_layers = self._judge.layers(seen)
        self._landed, self._tally.known = self._judge.fold(self._tally.known, seen, ago=self._tally.clock.tau - tau)

    def _note_sizes(self, seen: Observation) -> None:
        """Keep the mean of one over a micro-batch's size over all ranks: what a lagged step takes for its own."""
        if seen.shares.count:
            self._inverse_size = seen.shares.inverse / seen.shares.count

    def forget(self) -> None:
        """Nothing is under way: a state was loaded."""
        self._flight = self._landed = self._judged = self._inverse_size = None
        self._landed_layers = {}
        self._taken.clear()

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ---- before ----

    def _before(self, index: int, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.restore()
        self._pending = None
        for p in trainable(self._values[index].optimizer)[:1]:  # a group may be empty
            check_not_captured(p)
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            self._prepare(index)
            return None

        def closure_then_prepare() -> Any:  # this hook runs before the closure's backward; the scaling comes after it
            loss = closure()
            self.restore()
            self._prepare(index)
            return loss

        if len(args) < 2:
            return args, {**kwargs, "closure": closure_then_prepare}
        return (args[0], closure_then_prepare, *args[2:]), kwargs

    def _prepare(self, index: int) -> None:
        values = self._values[index]
        if self._taken and self._judged is not None and self._backed_off():
            self._count(self._judged.step, skipped=True)
        if index in self._taken:
            raise UsageError(
                f"{type(values.optimizer).__name__} steps again, and another optimizer of the same controller has not "
                "stepped yet: a window is one step of each, after its last backward."
            )
        if self._taken and self._judged is not None and self._judged.stamp != self._stamp:
            raise UsageError(
                "There was a backward between the steps of two optimizers of the same controller, before that of "
                f"{type(values.optimizer).__name__}: a window is one step of each, after its last backward. Two that "
                "train against each other, in a GAN say, need a controller each."
            )
        judged = self._judged if self._taken else self._judge_window(values.optimizer)
        if judged is None:
            return
        self._use(judged)
        step = self._pending = judged.step
        held = ExitStack()
        self._restore_values = held.close
        if step.skipped:
            held.enter_context(withheld(values.optimizer))
            held.enter_context(values.uncounted())
            return
        scaling = step.scaling if index == 0 else self._judge.scaling(step, exponent=values.exponent)
        factors = [
            scaling.lr_factor
            if same
            else self._judge.scaling(step, exponent=partial(values.exponent, group=i)).lr_factor
            for i, same in enumerate(values.same_law)
        ]
        held.enter_context(values.scaled(lr_factor=factors, iterations=scaling.iterations, scale=step.scale))

    @property
    def _stamp(self) -> int | None:
        """Of all that was seen since the last step; `None` where nothing watches."""
        return None if self._gather is None else self._gather.stamp

    def peek(self) -> Step | None:
        """How far a step would go now; `None` where nothing was seen since the last."""
        if self._gather is not None and not self._gather.pending and self._engine.ranks.group is None:
            return None
        judged = self._judge_window(self._values[0].optimizer)
        return None if judged is None or judged.step.count == 0 else judged.step

    def _judge_window(self, optimizer: Optimizer) -> "_Judged | None":
        """How far the steps of this window may go; `None` where it is none of training."""
        if self._gather is not None:
            check_no_backward()
            self._gather.follow(self._trainable())
        emptied = self._gather is not None and self._empty(self._gather)
        seen = self._gather is not None and self._gather.pending
        if not seen and not emptied and is_phantom(optimizer, counted=self._gather is not None):
            return None
        for each in self._values:
            check_base(each.optimizer)
        self._complaints.before()
        for driver in self._drivers:
            driver.check()
        share = self._share()
        if self._gather is not None:
            self._engine.check(share is not None)
            if not self._gather.pending:
                check_in_use(optimizer, model=self._model)
        stamp = self._stamp
        if stamp is None or self._judged is None or self._judged.stamp != stamp:
            self._judged = _Judged(stamp, *self._observe(share))
        # Else the same window again: after a look at it, a step() that raised, or from one that calls another step().
        return self._judged

    def _use(self, judged: "_Judged") -> None:
        """The window is stepped by: what a look at it leaves as it was, once."""
        if judged.used:
            return
        judged.used = True
        if self._gather is not None:
            self._gather.sizes.check(self._gather.pending)
            if self._reduction != "mean":
                self._gather.average(divisor_of(self._reduction, self._gather.pending))
        if judged.flight is not None:
            self._flight, self._landed, self._landed_layers = (judged.flight, self._tally.clock.tau), None, {}

    def _trainable(self) -> list[Tensor]:
        return [p for each in self._values for p in trainable(each.optimizer)]

    def _empty(self, gather: Gather) -> bool:
        """Drop a window whose gradients were cleared before the step: the step has nothing to go by."""
        if not gather.emptied():
            return False
        gather.close()
        self._complaints.once(
            "The gradients were cleared between the last backward and optimizer.step(): such a step does not count, "
            "and the clock stands. Call optimizer.zero_grad() after the step, not before it."
        )
        return True

    def _observe(self, share: Share | None) -> tuple[Step, Flight | None]:
        """Everything that is known of the coming step: from its own gradients, or, lagged, from those of the last, with
        the reduction of its own under way.
        """
        if self._gather is None:
            return self._judge.step(self._tally.known, None), None
        window, ranks = self._gather.window(), self._engine.ranks
        if window.backwards == 0 and ranks.group is None:
            return self._judge.nothing(self._tally.known), None
        if window.layers is not None and window.backwards * ranks.size == 1:
            self._complaints.once(
                "One gradient a step shows no noise, so there is none by layer either: accumulate over two or more "
                "backwards, or cut the batch with anybatch.split(batch, 2)."
            )
        self.land()
        checksum = 0 if ranks.group is None else self._tally.checksum()
        flight = launch(
            window, ranks=ranks, reduction=self._reduction, checksum=checksum, ahead=self._lagged, share=share
        )
        if not self._lagged:
            return self._judge.step(self._tally.known, flight.land()), None
        count = window.backwards * ranks.size  # on every rank as many, or landing raises
        if count == 0:
            return self._judge.nothing(self._tally.known), flight
        if ranks.group is None:
            inverse_size = window.shares.inverse / window.backwards
        elif self._inverse_size is None:  # the first step waits for the sizes on the other ranks
            self._note_sizes(flight.land())
            inverse_size = self._inverse_size or 0.0
        else:
            inverse_size = self._inverse_size
        inverse_sizes = count * inverse_size
        step = self._judge.decide(self._tally.known, count=count, inverse_sizes=inverse_sizes, raw=self._landed)
        return replace(step, layers=self._landed_layers), flight

    # ---- after ----

    def _after(self, index: int, optimizer: Optimizer, _: tuple[Any, ...], __: dict[str, Any]) -> None:
        step, self._pending = self._pending, None
        if step is None:
            return
        if index == 0 and self._logbook.writes:
            self._lr = self.lr
        self.restore()
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer under a GradScaler skips by itself
        self._taken[index] = found_inf is not None and bool(found_inf)
        if len(self._taken) < len(self._values):
            self._partial = self._stamp, self._factor()
            return
        skipped = step.skipped or any(self._taken.values())
        if self._gather is not None:
            self._gather.close(forget=skipped)
        self._count(step, skipped=skipped)

    def _factor(self) -> Tensor | None:
        """The loss's factor in the window, which Lightning and Accelerate may change after each optimizer; as it is now
        where nobody watched.
        """
        if self._gather is not None and self._gather.loss_scale is not None:
            return self._gather.loss_scale
        scale = self._loss_scale()
        return None if scale is None else scale.clone()  # the scaler changes its own tensor in place

    def _backed_off(self) -> bool:
        """Whether a GradScaler has lowered its factor since an earlier window: the gradients of an optimizer that did
        not step by it were not finite, and it never will. It skips each for itself; a step is all of them or none.
        """
        stamp, before = self._partial
        if stamp is not None and stamp == self._stamp:
            return False
        scale = self._loss_scale()
        return scale is not None and before is not None and bool(scale < before)

    def _count(self, step: Step, *, skipped: bool) -> None:
        """Every optimizer has stepped that will."""
        self._taken.clear()
        try:
            self._tally.add(step, skipped=skipped)
        finally:  # the step has happened, whatever those who follow the clock make of it
            if self._logbook.writes:
                self._logbook.step(self._tally.line(step, lr=self._lr, skipped=skipped))
        if skipped:
            self._complaints.skipped(step)
