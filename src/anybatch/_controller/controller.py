"""The controller: hooks on the user's own optimizer, and the order of one step.

[Note: one step] Before `step()`: the window is read and reduced, moments and gain follow, the rule gives the scaling,
and the optimizer's values are changed for this one call. After it: they are put back, and, if the step really happened,
the averages are kept, the clock moves, and with it the schedule and every subscriber. Nothing is kept before the step
has happened, so a step that raises leaves no trace. docs/architecture.md draws it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from math import nan
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch._controller.judge import Judge, Step
from anybatch._controller.state import STATE_VERSION, checked_state
from anybatch._controller.tally import Readings, Tally
from anybatch._errors import UsageError
from anybatch._gradients import (
    Companion,
    Flight,
    Gather,
    Reduction,
    check_no_backward,
    engine_of,
    is_phantom,
    launch,
    trainable,
    trained_parameters,
)
from anybatch._maps import check_base
from anybatch._record import Destination, Logbook, progress_bar, run_config
from anybatch._scaling import (
    AdaScale,
    BatchSize,
    Clock,
    Moments,
    Rule,
    ScheduleDriver,
    attached,
    check_decays,
    check_positive,
    family_of,
    scaled,
)


class Controller(Readings, Companion):
    """What `attach` returns: the clock, the last step's numbers, state, and `detach()`."""

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        model: nn.Module,
        rule: Rule,
        scheduler: Any,
        batch: BatchSize,
        clock: Clock,
        process_group: dist.ProcessGroup | None,
        grad_scaler: torch.amp.GradScaler | None,
        reduction: Reduction,
        lagged: bool,
        record: Destination | Sequence[Destination] | None,
    ) -> None:
        if optimizer in attached:
            raise UsageError("This optimizer has a controller already: detach() that one first.")
        self._optimizer = optimizer
        self._rule = rule
        self._batch = batch
        self._reduction: Reduction = reduction
        adascale = rule if isinstance(rule, AdaScale) else None
        self._family = family_of(optimizer, exponent=adascale.exponent if adascale else 1.0)
        self._decays = rule.decays or self._family.decays
        check_decays(optimizer, self._family, self._decays)
        self._judge = Judge(rule=rule, batch=batch, clock=clock, exponent=self._family.exponent)
        trained = trained_parameters(optimizer, model=model)
        self._size = sum(p.numel() for p in trained)
        self._engine = engine_of(model, trained, process_group)
        counted = adascale is not None or batch.counts
        foreseen = not lagged and grad_scaler is None
        super().__init__(self._engine.ddp, ranks=self._engine.ranks, counted=counted, foreseen=foreseen)
        self._driver = None if scheduler is None else ScheduleDriver(scheduler, optimizer=optimizer, clock=clock)
        self._gather: Gather | None = None
        if counted:
            self._gather = Gather(
                trained,
                measure=adascale is not None,
                leaves=self._engine.leaves,
                reduced=self._engine.reduced,
                loss_scale=lambda: getattr(grad_scaler, "_scale", None),
                consecutive=adascale is not None and adascale.consecutive,
            )
            self._gather.micro_batch = batch.micro_batch or 1.0
        self._pending: Step | None = None
        self._lagged = lagged
        self._flight: Flight | None = None
        self._landed: Moments | None = None
        self._restore_values: Callable[[], None] | None = None
        self._tally = Tally(clock=clock, batch=batch)
        config = run_config(
            optimizer,
            rule=rule,
            decays=self._decays,
            total=clock.total,
            batch=batch,
            ranks=self._ranks.size,
            trained=trained,
        )
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            self._logbook = Logbook(record, config=config, first=self._ranks.first)
        except Exception:
            self._let_go()
            raise
        self._handles = [
            # A compiled step must not trace these: it would bake in the first gain, or apply none at all.
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
            optimizer.register_state_dict_pre_hook(lambda _: self._restore()),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self._restore()),
        ]
        attached.add(optimizer)

    # ---- what a user calls ----

    @property
    def done(self) -> bool:
        """Whether `tau >= total`; an error without a `total`."""
        self._restore()
        return self.clock.done

    @property
    def micro_batch(self) -> float | None:
        """What each backward sees; set it before a backward where batches vary."""
        return self._gather.micro_batch if self._gather and self._batch.micro_batch else None

    @micro_batch.setter
    def micro_batch(self, value: float) -> None:
        if self._gather is None or self._batch.micro_batch is None:
            raise UsageError("micro_batch can be set only where attach was given base_batch and micro_batch.")
        self._gather.micro_batch = check_positive("micro_batch", value)

    @property
    def base_lr(self) -> float:
        """The first group's learning rate where the schedule is now, before any scaling."""
        self._restore()
        return float(self._optimizer.param_groups[0]["lr"])

    def paused(self) -> AbstractContextManager[None]:
        """A context whose backwards are not training: neither counted nor measured."""
        return nullcontext() if self._gather is None else self._gather.paused()

    def observe(self, gradients: Sequence[Tensor]) -> None:
        """Give one step's micro-batch gradients computed elsewhere, with `torch.func.vmap` say, in place of backwards.

        `.grad` of each parameter becomes the mean over the n micro-batches.

        Args:
            gradients: one tensor `[n, *parameter.shape]` for each trained parameter, in the optimizer's order, each
                micro-batch's own mean gradient, not divided by n.

        Raises:
            InvalidValueError: wrong shapes.
            UsageError: under DDP, after a backward of the same step, or with nothing to measure.
        """
        if self._gather is None:
            raise UsageError("observe() has nothing to tell a rule that neither measures nor counts.")
        if self._reduction != "mean":
            raise UsageError('observe() sets .grad to the mean of the gradients: attach with reduction="mean".')
        self._gather.observe(gradients)

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
            self.clock, shown=self._ranks.first, values=lambda: self._tally.in_words(self._lr()), console=console
        )

    def state_dict(self) -> dict[str, float | int]:
        """All that a resumed run needs: flat, numbers only, and the same at any scale and number of ranks."""
        self._restore()
        self._land()
        return {
            "version": STATE_VERSION,
            "parameters": self._size,
            "base_batch": self._batch.base_batch or 0.0,
            **self._tally.numbers(),
            "schedule_offset": 0 if self._driver is None else self._driver.offset,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; load the model's, the optimizer's and the scheduler's own states as well.

        Raises:
            StateError: the state has other names or a newer version, or is of another model or base batch.
        """
        values = checked_state(state, mine=self.state_dict())
        self._tally.adopt(values)
        self._flight = self._landed = None
        self._logbook.resume()
        if self._driver is not None:
            self._driver.resume(offset=int(values["schedule_offset"]))

    def detach(self) -> None:
        """Remove every hook and close the record that `attach` opened; the optimizer is as it was before `attach`."""
        self._restore()
        self._let_go()
        self._logbook.close()
        attached.discard(self._optimizer)

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._gather is not None:
            self._gather.detach()
        if self._driver is not None:
            self._driver.stop()

    @property
    def _followed(self) -> bool:
        return self.clock.subscribers > (self._driver is not None)

    def _go_on(self, values: Mapping[str, float]) -> None:
        self._tally.adopt(values)
        self._flight = self._landed = None
        if self._driver is not None:
            self._driver.catch_up()

    # ---- one step ----

    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._restore()
        self._pending = None
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            self._prepare()
            return None

        def closure_then_prepare() -> Any:  # this hook runs before the closure's backward; the scaling comes after it
            loss = closure()
            self._restore()
            self._prepare()
            return loss

        if len(args) < 2:
            return args, {**kwargs, "closure": closure_then_prepare}
        return (args[0], closure_then_prepare, *args[2:]), kwargs

    def _prepare(self) -> None:
        if self._gather is not None:
            check_no_backward()
            self._gather.follow(trainable(self._optimizer))
        seen = self._gather is not None and self._gather.pending
        if not seen and is_phantom(self._optimizer, counted=self._gather is not None):
            return
        check_base(self._optimizer)
        if self._driver is not None:
            self._driver.check()
        if self._gather is not None:
            self._engine.check(self._join_config.enable)
        self._pending = step = self._observe()
        if step.skipped:
            return
        values = ExitStack()
        values.enter_context(
            scaled(
                self._optimizer,
                self._family,
                lr_factor=step.scaling.lr_factor,
                iterations=step.scaling.iterations,
                decays=self._decays,
            )
        )
        self._restore_values = values.close

    def _observe(self) -> Step:
        """Everything that is known of the coming step: from its own gradients, or, lagged, from those of the last."""
        if self._gather is None:
            return self._judge.step(self._tally.averages, None)
        window, ranks = self._gather.window(), self._ranks
        if window.backwards == 0 and ranks.group is None:
            return self._judge.nothing(self._tally.averages)
        flight = launch(window, ranks=ranks, reduction=self._reduction, ahead=self._lagged, share=self._share())
        if not self._lagged:
            return self._judge.step(self._tally.averages, flight.land())
        self._land()
        raw, self._landed = self._landed, None
        self._flight = flight
        count, inverse_sizes = window.backwards * ranks.size, window.inverse_sizes * ranks.size
        return self._judge.decide(self._tally.averages, count=count, inverse_sizes=inverse_sizes, raw=raw)

    def _land(self) -> None:
        """Fold what is still under way from the last step, lagged, into the averages, and keep it for the record."""
        if self._flight is not None:
            self._landed, self._tally.averages = self._judge.fold(self._tally.averages, self._flight.land())
            self._flight = None

    def _after(self, optimizer: Optimizer, _: tuple[Any, ...], __: dict[str, Any]) -> None:
        step, self._pending = self._pending, None
        if step is None:
            return
        lr = self._lr() if self._logbook.writes else nan
        self._restore()
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer under a GradScaler skips by itself
        skipped = step.skipped or (found_inf is not None and bool(found_inf))
        if self._gather is not None:
            self._gather.close(forget=skipped)
        self._tally.add(step, skipped=skipped)
        if self._logbook.writes:
            self._logbook.step(self._line(step, lr=lr, skipped=skipped))

    def _lr(self) -> float:
        return float(self._optimizer.param_groups[0].get("lr", nan))

    def _restore(self) -> None:
        """Put the base values back; after a step that raised, at the next opportunity."""
        restore, self._restore_values = self._restore_values, None
        if restore is not None:
            restore()
