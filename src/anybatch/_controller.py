"""The controller: hooks on the user's own optimizer, and the order of one step.

[Note: one step] Before `step()`: the window is read and reduced, moments and gain follow, the rule gives the scaling,
and the optimizer's values are changed for this one call. After it: they are put back, and, if the step really happened,
the averages are kept, the clock moves, and with it the schedule and every subscriber. Nothing is kept before the step
has happened, so a step that raises leaves no trace. docs/architecture.md draws it.
"""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import isnan, nan
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.optim import Optimizer

from anybatch._batch import BatchSize, check_positive
from anybatch._clock import Clock
from anybatch._engine import engine_of
from anybatch._errors import InvalidValueError, UnsupportedError, UsageError
from anybatch._gather import Gather
from anybatch._hyperparameters import check_decays, family_of, scaled
from anybatch._join import ShadowHook
from anybatch._judge import Judge, Step
from anybatch._moments import Averages, Moments
from anybatch._record import RunRecord, StepRecord
from anybatch._reduce import Flight, Reduction, Share, launch, shadow
from anybatch._rules import AdaScale, Rule
from anybatch._schedules import ScheduleDriver
from anybatch._state import STATE_VERSION, checked_state

_attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


class Controller(Joinable):
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
        record: str | PathLike[str] | RunRecord | None,
    ) -> None:
        super().__init__()
        if not isinstance(optimizer, Optimizer):
            raise InvalidValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if optimizer in _attached:
            raise UsageError("This optimizer has a controller already: detach() that one first.")
        if not isinstance(rule, Rule):
            raise InvalidValueError(f"rule must be an anybatch.Rule, such as AdaScale(), got {rule!r}.")
        if reduction not in ("mean", "sum"):
            raise InvalidValueError(f'reduction must be "mean" or "sum", got {reduction!r}.')
        self._optimizer = optimizer
        self._rule = rule
        self._batch = batch
        self._reduction: Reduction = reduction
        self._clock = clock
        adascale = rule if isinstance(rule, AdaScale) else None
        self._family = family_of(optimizer, exponent=adascale.exponent if adascale else 1.0)
        self._decays = rule.decays or self._family.decays
        check_decays(optimizer, self._family, self._decays)
        self._judge = Judge(rule=rule, batch=batch, clock=clock, exponent=self._family.exponent)
        trained = _check_parameters(optimizer, model)
        self._engine = engine_of(model, trained, process_group)
        self._driver = None if scheduler is None else ScheduleDriver(scheduler, optimizer=optimizer, clock=clock)
        self._gather: Gather | None = None
        if adascale is not None or batch.counts:
            self._gather = Gather(
                trained,
                measure=adascale is not None,
                leaves=self._engine.leaves,
                reduced=self._engine.reduced,
                loss_scale=lambda: getattr(grad_scaler, "_scale", None),
                consecutive=adascale is not None and adascale.consecutive,
            )
            self._gather.micro_batch = batch.micro_batch or 1.0
        self._size = sum(p.numel() for p in trained)
        self._averages = Averages()
        self._pending: Step | None = None
        self._lagged = lagged
        self._scaler = grad_scaler
        self._flight: Flight | None = None
        self._restore_values: Callable[[], None] | None = None
        self._last: Step | None = None
        self._time = time.perf_counter()
        self.steps = 0
        self.skipped = 0
        self._record: RunRecord | None = None
        self._owns_record = record is not None and not isinstance(record, RunRecord)
        if record is not None and self._engine.ranks.first:
            self._record = record if isinstance(record, RunRecord) else RunRecord(record, config=self._config())
        self._handles = [
            # A compiled step must not trace these: it would bake in the first gain, or apply none at all.
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
            optimizer.register_state_dict_pre_hook(lambda _: self._restore()),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self._restore()),
        ]
        _attached.add(optimizer)

    # ---- what a user reads ----

    @property
    def clock(self) -> Clock:
        """The clock; subscribe what should move with training."""
        return self._clock

    @property
    def tau(self) -> float:
        """Base iterations done."""
        return self._clock.tau

    @property
    def done(self) -> bool:
        """Whether `tau >= total`; an error without a `total`."""
        self._restore()
        return self._clock.done

    @property
    def gain(self) -> float:
        """The gain r of the last step; nan before the first, and for rules other than AdaScale."""
        return nan if self._last is None else self._last.gain

    @property
    def scale(self) -> float:
        """S of the last step; nan before the first."""
        return nan if self._last is None else self._last.scale

    @property
    def count(self) -> int:
        """N, the micro-batches on all ranks in the last step; 0 where nothing needed counting."""
        return 0 if self._last is None else self._last.count

    @property
    def lr_factor(self) -> float:
        """The factor that the last step applied to `lr(tau)`."""
        return nan if self._last is None else self._last.scaling.lr_factor

    @property
    def iterations(self) -> float:
        """How far the last step moved the clock, base iterations."""
        return nan if self._last is None else self._last.scaling.iterations

    @property
    def variance(self) -> float:
        """The averaged sigma^2 of one base batch, clipped at 0; nan while unknown."""
        variance = self._averages.moments.variance
        return variance if isnan(variance) else max(variance, 0.0)

    @property
    def sqnorm(self) -> float:
        """The averaged mu^2, clipped at 0; nan while unknown."""
        sqnorm = self._averages.moments.sqnorm
        return sqnorm if isnan(sqnorm) else max(sqnorm, 0.0)

    @property
    def noise_scale(self) -> float:
        """B_simple = base_batch * variance / sqnorm, in examples; in base batches where no `base_batch` was given."""
        return self._averages.moments.noise_scale * (self._batch.base_batch or 1.0)

    @property
    def micro_batch(self) -> float | None:
        """What each backward sees; set it before a backward where batches vary."""
        return self._gather.micro_batch if self._gather and self._batch.micro_batch else None

    @micro_batch.setter
    def micro_batch(self, value: float) -> None:
        if self._gather is None or self._batch.micro_batch is None:
            raise UsageError("micro_batch can be set only where attach was given base_batch and micro_batch.")
        self._gather.micro_batch = check_positive("micro_batch", value)

    # ---- what a user calls ----

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

    def state_dict(self) -> dict[str, float | int]:
        """All that a resumed run needs: flat, numbers only, and the same at any scale and number of ranks."""
        self._restore()
        self._land()
        return {
            "version": STATE_VERSION,
            "parameters": self._size,
            "base_batch": self._batch.base_batch or 0.0,
            "tau": self._clock.tau,
            "steps": self.steps,
            "skipped": self.skipped,
            "variance": self._averages.variance,
            "sqnorm": self._averages.sqnorm,
            "weight": self._averages.weight,
            "samples": self._averages.samples,
            "iterations": self._averages.iterations,
            "schedule_offset": 0 if self._driver is None else self._driver.offset,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; load the model's, the optimizer's and the scheduler's own states as well.

        Raises:
            StateError: the state has other names or a newer version, or is of another model or base batch.
        """
        values = checked_state(state, mine=self.state_dict())
        self._adopt(values)
        if self._driver is not None:
            self._driver.resume(offset=int(values["schedule_offset"]))

    def _adopt(self, values: Mapping[str, float]) -> None:
        self._clock.tau = values["tau"]
        self.steps, self.skipped = int(values["steps"]), int(values["skipped"])
        self._averages = Averages(
            values["variance"], values["sqnorm"], values["weight"], int(values["samples"]), values["iterations"]
        )
        self._flight = None
        self._last = None

    def detach(self) -> None:
        """Remove every hook and close the record that `attach` opened; the optimizer is as it was before `attach`."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._gather is not None:
            self._gather.detach()
        if self._driver is not None:
            self._driver.stop()
        if self._record is not None and self._owns_record:
            self._record.close()
        _attached.discard(self._optimizer)

    # ---- uneven inputs: torch.distributed.algorithms.Join([model, controller]) ----

    def join_hook(self, **_: Any) -> JoinHook:
        """What `Join` calls on a rank that has run out of data; the model must come first in its list."""
        ddp = self._engine.ddp
        if ddp is None or self._lagged or self._scaler is not None:
            raise UnsupportedError(
                "Join needs a model under DistributedDataParallel, and neither lagged=True nor a grad_scaler: the "
                "ranks that are done must know which steps the others take."
            )
        counted = self._gather is not None
        return ShadowHook(
            ddp, shadow=lambda: shadow(self._engine.ranks) if counted else None, adopt=self._adopt_from_last
        )

    @property
    def join_device(self) -> torch.device:
        """DDP's."""
        return self._engine.ddp.join_device if self._engine.ddp is not None else torch.device("cpu")

    @property
    def join_process_group(self) -> Any:
        """DDP's."""
        return self._engine.ranks.group

    def _share(self) -> Share | None:
        if self._engine.ddp is None or not self._join_config.enable:
            return None
        return "all" if self._engine.ddp._divide_by_initial_world_size else "active"

    def _adopt_from_last(self, is_last: bool) -> None:
        """Take the clock and the averages of the rank that took the most steps."""
        state, group = self.state_dict(), self._engine.ranks.group
        numbers = torch.tensor(list(state.values()), dtype=torch.float64, device=self.join_device)
        source = torch.tensor(dist.get_rank() if is_last else -1, device=self.join_device)
        dist.all_reduce(source, op=dist.ReduceOp.MAX, group=group)
        dist.broadcast(numbers, src=int(source), group=group)
        self._adopt(dict(zip(state, numbers.tolist(), strict=True)))
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
            if torch._C._current_graph_task_id() != -1:
                raise UsageError(
                    "optimizer.step() was called during a backward, and what a step measures is complete only at its "
                    "end. Call it after loss.backward(), or give attach a number as scale and a rule that measures "
                    "nothing."
                )
            self._gather.follow(_trainable(self._optimizer))
        if self._is_phantom():
            return
        if self._driver is not None:
            self._driver.check()
        if self._gather is not None:
            self._engine.check(self._join_config.enable)
        self._pending = step = self._observe()
        if step.skipped:
            return
        context = scaled(
            self._optimizer,
            self._family,
            lr_factor=step.scaling.lr_factor,
            iterations=step.scaling.iterations,
            decays=self._decays,
        )
        context.__enter__()
        self._restore_values = lambda: _exit(context)

    def _is_phantom(self) -> bool:
        """Whether this `step()` is not training: distributed checkpoint primes an optimizer with zero gradients.

        Raises:
            UsageError: there are gradients, but no hook saw the backward that made them.
        """
        if self._gather is not None and self._gather.pending:
            return False
        grads = [p.grad for p in _trainable(self._optimizer) if p.grad is not None]
        if self._gather is not None and not grads:
            return False
        idle = all(float(group.get("lr", 1)) == 0 for group in self._optimizer.param_groups)
        if self._gather is None:
            return idle and not any(bool(g.any()) for g in grads)
        if idle:
            return True
        raise UsageError(
            "optimizer.step() was called with gradients that no backward of the attached model made since the last "
            "step. Is this another optimizer than the one given to attach, were the gradients written by hand (use "
            "controller.observe), or was the backward inside of controller.paused()?"
        )

    def _observe(self) -> Step:
        """Everything that is known of the coming step: from its own gradients, or, lagged, from those of the last."""
        if self._gather is None:
            return self._judge.step(self._averages, None)
        window, ranks = self._gather.window(), self._engine.ranks
        if window.backwards == 0 and ranks.group is None:
            return self._judge.nothing(self._averages)
        flight = launch(window, ranks=ranks, reduction=self._reduction, ahead=self._lagged, share=self._share())
        if not self._lagged:
            return self._judge.step(self._averages, flight.land())
        raw = self._land()
        self._flight = flight
        count, inverse_sizes = window.backwards * ranks.size, window.inverse_sizes * ranks.size
        return self._judge.decide(self._averages, count=count, inverse_sizes=inverse_sizes, raw=raw)

    def _land(self) -> Moments | None:
        """Fold what is still under way from the last step, lagged, into the averages."""
        if self._flight is None:
            return None
        raw, self._averages = self._judge.fold(self._averages, self._flight.land())
        self._flight = None
        return raw

    def _after(self, optimizer: Optimizer, _: tuple[Any, ...], __: dict[str, Any]) -> None:
        step, self._pending = self._pending, None
        if step is None:
            return
        lr = self._applied_lr() if self._record is not None else nan
        self._restore()
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer under a GradScaler skips by itself
        skipped = step.skipped or (found_inf is not None and bool(found_inf))
        if self._gather is not None:
            self._gather.close(forget=skipped)
        if skipped:
            self.skipped += 1
        else:
            self.steps += 1
            self._last = step
            self._averages = step.averages.moved(step.scaling.iterations)
            self._clock.advance(step.scaling.iterations)
        if self._record is not None:
            self._record.write(self._line(step, lr=lr, skipped=skipped))

    def _line(self, step: Step, *, lr: float, skipped: bool) -> StepRecord:
        now, before = time.perf_counter(), self._time
        self._time = now
        return StepRecord(
            step=self.steps,
            tau=self._clock.tau,
            iterations=0.0 if skipped else step.scaling.iterations,
            scale=step.scale,
            count=step.count,
            raw_variance=step.raw.variance,
            raw_sqnorm=step.raw.sqnorm,
            variance=self.variance,
            sqnorm=self.sqnorm,
            gain=step.gain,
            lr=lr,
            lr_factor=step.scaling.lr_factor,
            noise_scale=self.noise_scale,
            seconds=now - before,
            skipped=skipped,
        )

    def _applied_lr(self) -> float:
        return float(self._optimizer.param_groups[0].get("lr", nan))

    def _restore(self) -> None:
        """Put the base values back; after a step that raised, at the next opportunity."""
        restore, self._restore_values = self._restore_values, None
        if restore is not None:
            restore()

    def _config(self) -> dict[str, Any]:
        return {
            "rule": repr(self._rule),
            "optimizer": type(self._optimizer).__name__,
            "decays": self._decays,
            "total": self._clock.total,
            **vars(self._batch),
            "ranks": self._engine.ranks.size,
            "parameters": self._size,
        }


def _exit(context: AbstractContextManager[None]) -> None:
    context.__exit__(None, None, None)


def _trainable(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _check_parameters(optimizer: Optimizer, model: nn.Module) -> list[Tensor]:
    """The optimizer's trained parameters, after a look at whether they are the model's."""
    trained = _trainable(optimizer)
    if not trained:
        raise InvalidValueError("The optimizer has no parameter that requires a gradient: there is nothing to scale.")
    mine = {id(p) for p in model.parameters()}
    strangers = sum(id(p) not in mine for p in trained)
    if strangers:
        raise InvalidValueError(
            f"{strangers} of the {len(trained)} trained parameters of this optimizer are not in the model given to "
            "attach. Give the module whose parameters it trains (under DDP the wrapped module)."
        )
    return trained
