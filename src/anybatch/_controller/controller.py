"""The controller: what a user calls of a run; `step` has the order of one step."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from math import isnan
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch._controller.backwards import Backwards
from anybatch._controller.carried import Carrier
from anybatch._controller.judge import Judge
from anybatch._controller.loops import Loops
from anybatch._controller.state import STATE_VERSION, checked_state
from anybatch._controller.step import Stepper
from anybatch._controller.tally import Readings, Tally
from anybatch._errors import UnsupportedError, UsageError
from anybatch._gradients import (
    Companion,
    Gather,
    Layers,
    Metric,
    Reduction,
    Sizes,
    check_same,
    engine_of,
    trained_parameters,
)
from anybatch._record import Destination, Logbook, progress_bar, run_config
from anybatch._scaling import (
    AdaScale,
    BatchSize,
    Clock,
    Hyperparameters,
    Rule,
    ScheduleDriver,
    attached,
    bare_optimizer,
    family_of,
    held_by,
    second_moment_of,
)


class Controller(Readings, Loops, Backwards, Companion):
    """What `attach` returns: the clock, the last step's numbers, state, and `detach()`."""

    _attached = False

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        *,
        model: nn.Module,
        rule: Rule,
        schedulers: Sequence[Any],
        schedule_every: float,
        batch: BatchSize,
        clock: Clock,
        process_group: dist.ProcessGroup | None,
        grad_scaler: torch.amp.GradScaler | None,
        reduction: Reduction,
        lagged: bool,
        patience: int,
        record: Destination | Sequence[Destination] | None,
        per_layer: int | None,
    ) -> None:
        given, optimizers = optimizers, [bare_optimizer(optimizer) for optimizer in optimizers]
        if any(optimizer in attached for optimizer in optimizers):
            raise UsageError("This optimizer has a controller already: detach() that one first.")
        self._optimizers = optimizers
        self._rule = rule
        self._batch = batch
        self._population = batch.population
        self._reduction: Reduction = reduction
        adascale = rule if isinstance(rule, AdaScale) else None
        stated = (adascale.exponent, adascale.like) if adascale else (1.0, None)
        families = []
        for optimizer in optimizers:  # a comprehension is a frame more, or not, between a warning and its cause
            families.append(family_of(optimizer, exponent=stated[0], like=stated[1]))  # noqa: PERF401
        # Fixed rules are baselines: under them the automatic momentum is the papers', constant.
        total = None if adascale is None else clock.total
        values = [
            Hyperparameters(optimizer, family, rule.decays, total)
            for optimizer, family in zip(optimizers, families, strict=True)
        ]
        # One gain for all of them: the more careful one, where their own noise factors differ.
        noise_factor = min(family.noise_factor for family in families)
        judge = Judge(rule=rule, batch=batch, clock=clock, exponent=values[0].exponent, noise_factor=noise_factor)
        trained = [p for optimizer in optimizers for p in trained_parameters(optimizer, model=model)]
        self._size = sum(p.numel() for p in trained)
        engine = engine_of(model, trained, process_group)
        check_same(
            {
                "rule": repr(rule),
                "total": clock.total,
                "base_batch": batch.base_batch,
                "scale": batch.scale,
                "examples": batch.examples,
                "reduction": reduction,
                "lagged": lagged,
                "per_layer": per_layer,
                "optimizer": ", ".join(type(optimizer).__name__ for optimizer in optimizers),
                "number of trained parameters": self._size,
            },
            ranks=engine.ranks,
        )
        counted = adascale is not None or batch.counts or reduction != "mean"
        foreseen = not lagged and grad_scaler is None and per_layer is None
        metric, layers, tally = None, None, Tally(clock=clock, batch=batch)

        def loss_scale() -> Tensor | None:
            return getattr(grad_scaler, "_scale", None)

        self._tally = tally
        if per_layer is not None:
            if adascale is None:
                raise UsageError(f"{rule} measures no noise, by layer neither: give attach rule=anybatch.AdaScale().")
            layers = Layers(model, due=lambda: tally.steps % per_layer == 0)
        if adascale is not None and adascale.metric == "adam":
            if len(optimizers) > 1:
                raise UnsupportedError("AdaScale(metric='adam') is for one optimizer: use metric='euclidean'.")
            entry = second_moment_of(optimizers[0], families[0])
            metric = Metric(optimizers[0], entry=entry, steps=lambda: tally.steps, part=engine.part)
        super().__init__(engine.ddp, ranks=engine.ranks, counted=counted, foreseen=foreseen, weighed=metric is not None)
        self._drivers = [
            ScheduleDriver(each, optimizer=optimizer, clock=clock, every=schedule_every)
            for each, optimizer in _paired(schedulers, optimizers)
        ]
        self._gather: Gather | None = None
        if counted:
            self._gather = Gather(
                trained,
                measure=adascale is not None,
                due=lambda: self._stepper.due(),  # noqa: PLW0108 - there is none yet
                leaves=engine.leaves,
                reduced=engine.reduced,
                arrived=engine.arrived,
                loss_scale=loss_scale,
                consecutive=adascale is not None and adascale.consecutive,
                metric=metric,
                sizes=Sizes(model, given=batch.micro_batch),
                layers=layers,
            )
        config = run_config(
            optimizers,
            rule=rule,
            noise_factor=judge.noise_factor,
            total=clock.total,
            batch=batch,
            ranks=self._ranks.size,
            trained=trained,
        )
        try:
            self._logbook = Logbook(record, config=config, first=self._ranks.first)
            if per_layer is not None and self._ranks.first and not self._logbook.writes:
                raise UsageError("per_layer is written to the record: give attach record=, a path or a function.")
        except Exception:
            self._let_go()
            raise
        self._stepper = Stepper(
            model=model,
            given=given,
            values=values,
            judge=judge,
            engine=engine,
            gather=self._gather,
            drivers=self._drivers,
            tally=self._tally,
            logbook=self._logbook,
            reduction=reduction,
            lagged=lagged,
            patience=patience,
            share=self._share,
            loss_scale=loss_scale,
        )
        for driver in self._drivers:
            driver.hold()
        for optimizer in optimizers:
            attached.add(optimizer)
        self._attached = True
        self._carrier = Carrier(optimizers[0], clock=clock, written=self.state_dict, read=self.load_state_dict)
        try:
            self._carrier.take()
        except Exception:
            self.detach()
            raise

    # ---- what a user calls ----

    @property
    def done(self) -> bool:
        """Whether `tau >= total`.

        Raises:
            UsageError: there is no `total`; or it is not reached and never will be, as the controller is detached.
        """
        self._stepper.restore()
        done = self.clock.done
        if not (done or self._attached):
            raise UsageError(
                f"The controller is detached at tau = {self.tau:g} of {self.clock.total:g}: its clock stands, and a "
                "loop on `done` would never end."
            )
        return done

    @property
    def base_lr(self) -> float:
        """The first group's learning rate where the schedule is now, before any scaling."""
        self._stepper.restore()
        return self._stepper.lr

    def log(self, **results: float) -> None:
        """Add the results of an evaluation to the record, and to the trackers beside it, at this step and tau.

        Every rank may call it; rank 0's results are written.

        Args:
            results: numbers by their names, such as `accuracy=0.93`.

        Raises:
            InvalidValueError: a result that is not a number, or has the name of one of a step's own numbers.
            UsageError: `attach` was given no record on rank 0, or the controller is detached.
        """
        self._logbook.metrics(results, step=self.steps, tau=self.tau)

    def progress(self, *, console: Any = None) -> AbstractContextManager[None]:
        """A context with a progress bar in tau: gain, scale, learning rate and the time left.

        Nothing is shown on ranks other than 0, and where standard error is not a terminal.

        Args:
            console: a `rich.console.Console` to draw on.

        Raises:
            UsageError: rich is not installed.
        """
        return progress_bar(
            self.clock, shown=self._ranks.first, values=lambda: self._tally.in_words(self.base_lr), console=console
        )

    def state_dict(self) -> dict[str, float | int]:
        """All that a resumed run needs: flat, numbers only, and the same at any scale and number of ranks.

        The first optimizer's own `state_dict()` carries it too, in its first parameter group, and takes it back with
        `load_state_dict()`, or `attach` does where the optimizer was loaded before: saving this one is for those who
        want it apart.
        """
        self._stepper.restore()
        self._stepper.land()
        return {
            "version": STATE_VERSION,
            "parameters": self._size,
            "base_batch": self._batch.base_batch or 0.0,
            **self._tally.numbers(),
            "schedule_offset": self._drivers[0].offset if self._drivers else 0,
            "backwards": 0 if self._gather is None else self._gather.usual,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; load the model's, the optimizer's and the scheduler's own states as well.

        Raises:
            StateError: the state has other names or a newer version, or is of another model or base batch.
        """
        values = checked_state(state, mine=self.state_dict())
        self._tally.adopt(values)
        self._stepper.forget()
        self._logbook.resume()
        if self._gather is not None:
            self._gather.usual = int(values["backwards"])
        for driver in self._drivers:
            driver.resume(offset=int(values["schedule_offset"]))

    def detach(self) -> None:
        """Remove every hook and close the record that `attach` opened; the optimizer is as it was before `attach`."""
        self._stepper.restore()
        self._stepper.detach()
        self._carrier.remove()
        self._let_go()
        self._logbook.close()
        for optimizer in self._optimizers:
            attached.discard(optimizer)
        self._attached = False

    def __repr__(self) -> str:
        total = "" if self.clock.total is None else f" of {self.clock.total:g}"
        numbers = {"scale": self.scale, "gain": self.gain, "noise scale": self.noise_scale}
        known = "".join(f", {name} {value:.4g}" for name, value in numbers.items() if not isnan(value))
        detached = "" if self._attached else ", detached"
        return f"<Controller: tau {self.tau:.6g}{total}, {self.steps} steps{known}{detached}>"

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"A controller has no {name!r} to set; what may be set is micro_batch and weight.")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            "A controller hangs on its optimizer's hooks, so it cannot be copied or pickled: copy the optimizer, "
            "attach a controller of its own, and give that one this one's state_dict()."
        )

    def _let_go(self) -> None:
        if self._gather is not None:
            self._gather.detach()
        for driver in self._drivers:
            driver.stop()

    @property
    def _followed(self) -> bool:
        return self.clock.subscribers > len(self._drivers)

    def _go_on(self, values: Mapping[str, float]) -> None:
        self._tally.adopt(values)
        self._stepper.forget()
        for driver in self._drivers:
            driver.catch_up()


def _paired(schedulers: Sequence[Any], optimizers: Sequence[Optimizer]) -> list[tuple[Any, Optimizer]]:
    """Each scheduler with the optimizer that it moves; with the first where it does not tell."""
    mine = {id(optimizer): optimizer for optimizer in optimizers}
    moved = [getattr(held_by(each)[0], "optimizer", optimizers[0]) for each in schedulers]
    return [(each, mine.get(id(bare_optimizer(m)), optimizers[0])) for each, m in zip(schedulers, moved, strict=True)]
