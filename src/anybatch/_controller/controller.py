"""The controller: the user's interface to a run. `step_hooks` has the order of one step."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import isnan, nan
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.optim import Optimizer

from anybatch._controller.assembly import assemble, remove_hooks
from anybatch._controller.loops import Parts, passes
from anybatch._controller.run_state import clipped
from anybatch._controller.settings import Settings
from anybatch._controller.state import STATE_VERSION, checked_state
from anybatch._controller.state_in_optimizer import StateInOptimizer
from anybatch._errors import InvalidValueError, UsageError
from anybatch._gradients import divisor_of, entries_of
from anybatch._html import html_table
from anybatch._numbers import real, shown
from anybatch._record import progress_bar
from anybatch._scaling import Clock, Rule, attached, bare_optimizer, split

Batch = TypeVar("Batch")


class Controller(Joinable):
    """The result of `attach`: the clock, the last step's numbers, state, and `detach()`."""

    _attached = False

    def __init__(
        self, optimizers: Sequence[Optimizer], *, model: nn.Module, schedulers: Sequence[Any], settings: Settings
    ) -> None:
        super().__init__()
        given, optimizers = optimizers, [bare_optimizer(optimizer) for optimizer in optimizers]
        if any(optimizer in attached for optimizer in optimizers):
            raise UsageError("This optimizer has a controller already: detach() that one first.")
        self._optimizers = optimizers
        self._settings = settings
        self._parts: Parts | None = None
        self._batch_dim = 0
        made = assemble(
            given,
            optimizers,
            model=model,
            schedulers=schedulers,
            settings=settings,
            joined=lambda: self._join_config.enable,
            check=self._check_parts,
        )
        self._run, self._ranks, self._members, self._no_sync = made.state, made.ranks, made.members, made.no_sync
        self._measured = made.measured
        self._drivers, self._gradients, self._sinks = made.drivers, made.gradients, made.sinks
        self._join, self._step_hooks = made.join, made.step_hooks
        for optimizer in optimizers:
            attached.add(optimizer)
        self._attached = True
        self._stored = StateInOptimizer(
            optimizers[0], clock=self.clock, written=self.state_dict, read=self.load_state_dict
        )
        try:
            self._stored.take()
        except Exception:
            self.detach()
            raise

    # ---- what a user reads ----

    @property
    def rule(self) -> Rule:
        """The rule."""
        return self._settings.rule

    @property
    def ranks(self) -> int:
        """Number of processes that share each step."""
        return self._ranks.size

    @property
    def clock(self) -> Clock:
        """The clock; subscribe whatever follows the training."""
        return self._run.clock

    @property
    def tau(self) -> float:
        """Base iterations done."""
        return self._run.clock.tau

    @property
    def steps(self) -> int:
        """Number of steps that happened."""
        return self._run.steps

    @property
    def skipped(self) -> int:
        """Number of steps that did not count, because the gradient was not finite or missing."""
        return self._run.skipped

    @property
    def gain(self) -> float:
        """The gain r of the last step; nan before the first, and under a rule that does not measure."""
        return nan if self._run.last is None else self._run.last.gain

    @property
    def scale(self) -> float:
        """S of the last step; nan before the first."""
        return nan if self._run.last is None else self._run.last.scale

    @property
    def count(self) -> int:
        """N, the micro-batches on all ranks in the last step; 0 where nothing needed counting."""
        return 0 if self._run.last is None else self._run.last.count

    @property
    def lr_factor(self) -> float:
        """The factor that the last step applied to `lr(tau)`."""
        return nan if self._run.last is None else self._run.last.scaling.lr_factor

    @property
    def iterations(self) -> float:
        """The base iterations by which the last step advanced the clock."""
        return nan if self._run.last is None else self._run.last.scaling.iterations

    @property
    def variance(self) -> float:
        """The averaged sigma^2 of one base batch, clipped at 0; nan while unknown."""
        return clipped(self._run.running.averages.moments.variance)

    @property
    def sqnorm(self) -> float:
        """The averaged mu^2, clipped at 0; nan while unknown."""
        return clipped(self._run.running.averages.moments.sqnorm)

    @property
    def noise_scale(self) -> float:
        """B_simple = base_batch * variance / sqnorm, in examples; in base batches where no `base_batch` was given."""
        return self._run.noise_scale

    @property
    def done(self) -> bool:
        """Whether `tau >= total`.

        Raises:
            UsageError: there is no `total`, or the controller was detached before it.
        """
        self._step_hooks.restore()
        done = self.clock.done
        if not (done or self._attached):
            raise UsageError(
                f"The controller was detached at tau = {self.tau:g} of {self.clock.total:g}, so its clock stays there "
                "and a loop on `done` would never end. Detach it after the loop."
            )
        return done

    @property
    def epoch(self) -> int:
        """The present epoch, of the base batch's training: `floor(tau * base_batch / examples)`, from 0.

        Raises:
            UsageError: `attach` was not given `examples`.
        """
        if self._settings.batch.population is None:
            raise UsageError("The length of an epoch is unknown: pass attach base_batch and examples=len(data).")
        return self.clock.count(self._settings.batch.population)

    @property
    def base_lr(self) -> float:
        """The first group's learning rate at the schedule's present position, before any scaling."""
        self._step_hooks.restore()
        return self._step_hooks.lr

    # ---- what a loop does with it ----

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over `loader` again and again until the controller is done.

        At each pass `set_epoch` of a sampler, batch sampler or data set gets the number of steps so far. So a resumed
        run does not repeat the orders of its beginning, and all ranks have the same order.

        Args:
            loader: The batches, for example a DataLoader.

        Raises:
            InvalidValueError: a pass has no batch.
            UsageError: there is no `total`.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            >>> controller = anybatch.attach(optimizer, model=model, base_batch=4, micro_batch=4, epochs=3, examples=32)
            >>> for x in controller.batches([torch.randn(8, 4) for _ in range(4)]):
            ...     for part, share in controller.parts(x, 2):
            ...         (model(part).square().mean() * share).backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            >>> 24 <= controller.tau < 26
            True
        """
        return passes(loader, done=lambda: self.done, steps=lambda: self.steps)

    def parts(self, batch: Any, n: int) -> Iterator[tuple[Any, float]]:
        """The `n` equal micro-batches of `batch`, each with the factor on its loss.

        Under DDP all but the last are inside of `no_sync`. With several `batches` a step, multiply the share by one
        over their number. The size of a part is known by its dimension `batch_dim`: parts of a shorter last batch count
        as less than `micro_batch`, in proportion to those of the first batch.

        Args:
            batch: As for `anybatch.split`.
            n: Number of parts, a divisor of dimension `batch_dim` of every tensor.

        Returns:
            An iterator over pairs `(part, share)`. The share is `1 / n`; 1 with `reduction="sum"`; or one over the
            divisor passed as `reduction`.

        Raises:
            InvalidValueError: as for `anybatch.split`.
            UsageError: an earlier loop was left before its last part, and its gradients were not cleared.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            >>> controller = anybatch.attach(optimizer, model=model, base_batch=4, micro_batch=4)
            >>> for part, share in controller.parts(torch.randn(16, 4), 4):
            ...     (model(part).square().mean() * share).backward()
            >>> optimizer.step()
            >>> controller.scale
            4.0
        """
        self._check_parts()
        self._parts = Parts(
            split(batch, n, batch_dim=self._batch_dim),
            n,
            batch_dim=self._batch_dim,
            share=1 / divisor_of(self._settings.reduction, n),
            no_sync=self._no_sync,
            size=lambda rows: None if self._gradients is None else self._gradients.sizes.part(rows),
        )
        return self._parts

    def _check_parts(self) -> None:
        """Raise if a loop over `parts` was left and its gradients are still there."""
        parts, self._parts = self._parts, None
        if parts is not None and parts.left and self._gradients is not None and self._gradients.holds():
            raise UsageError(
                f"A loop over controller.parts() was left at part {parts.taken} of {parts.n}, so .grad holds a part of "
                "a step: call optimizer.zero_grad() and begin the step again."
            )

    @property
    def micro_batch(self) -> float | None:
        """The size of each micro-batch; set it before a backward where sizes vary, to 0 for an empty one."""
        return self._gradients.sizes.now if self._gradients and self._settings.batch.micro_batch else None

    @micro_batch.setter
    def micro_batch(self, value: float) -> None:
        if self._gradients is None or self._settings.batch.micro_batch is None:
            raise UsageError("micro_batch cannot be set under a fixed scale: pass attach base_batch and micro_batch.")
        size = real(value)
        if size is None or size < 0:
            raise InvalidValueError(f"micro_batch must be a finite number, at least 0, got {shown(value)}.")
        self._gradients.sizes.set(size)

    @property
    def batch_dim(self) -> int:
        """The dimension that counts examples, for `parts` and `micro_batch="auto"`; 0 unless set, at least 0."""
        return self._batch_dim

    @batch_dim.setter
    def batch_dim(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidValueError(f"batch_dim must be a dimension, at least 0, got {shown(value)}.")
        self._batch_dim = value
        if self._gradients is not None:
            self._gradients.sizes.batch_dim = value

    @property
    def weight(self) -> float | None:
        """The next backward's weight in the step's mean: its tokens, where a loss is a mean over all tokens of a step.

        A step's gradient is then `gbar = sum_i h_i` with `h_i = w_i g_i`. Divide each loss by the weights of the whole
        step, on all ranks, so that the `w_i` add up to 1. Set the weight before each backward, in any unit:

            Q = sum_i w_i^2 / (sum_i w_i)^2
            variance of gbar = (sum_i ||h_i||^2 - Q ||gbar||^2) / (1 - Q).

        The scale counts the sizes, `S = sum_i b_i / base_batch`: `micro_batch` stays in the unit of `base_batch`.

        Raises:
            InvalidValueError: a weight below 0 or not finite.
            UsageError: at the step, only some backwards had a weight, or all weights are 0. When set, under a rule
                that neither measures nor counts.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> controller = anybatch.attach(optimizer, model=model, base_batch=1, micro_batch=1)
            >>> sequences = [torch.randn(5, 4), torch.randn(3, 4)]
            >>> for x in sequences:
            ...     controller.weight = len(x)
            ...     (model(x).square().sum() / 8).backward()
            >>> optimizer.step()
            >>> controller.scale
            2.0
        """
        return None if self._gradients is None else self._gradients.sizes.weight

    @weight.setter
    def weight(self, value: float) -> None:
        if self._gradients is None:
            raise UsageError("weight has no effect under a rule that neither measures nor counts: leave it out.")
        number = real(value)
        if number is None or number < 0:
            raise InvalidValueError(f"weight must be a finite number, at least 0, got {shown(value)}.")
        self._gradients.sizes.weight = number

    def peek(self) -> float:
        """The gain that `step()` would have now, between the last backward and the step; later backwards change it.

        Without a backward since the last step it is `gain`, the last step's. The call synchronises with the device.
        Over several ranks it runs the all-reduce of the step: call it on every rank.

        Raises:
            UsageError: as for `step()`, for example if the gradients are not averaged over the ranks.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> controller = anybatch.attach(optimizer, model=model, scale="count")
            >>> for x in torch.randn(2, 8, 4):
            ...     (model(x).square().mean() / 2).backward()
            >>> coming = controller.peek()
            >>> optimizer.step()
            >>> controller.gain == coming
            True
        """
        step = self._step_hooks.peek()
        return self.gain if step is None else step.gain

    def mean_gradients(self) -> None:
        """Make `.grad` the mean over the window's micro-batches now, with `reduction="sum"` or a number.

        `step()` does it where nobody did. Call it before `clip_grad_norm_`, so that the clip sees the mean, whose norm
        does not depend on the accumulation. With `reduction="mean"` it does nothing.

        Raises:
            UsageError: as `step()` would.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> controller = anybatch.attach(optimizer, model=model, scale="count", reduction="sum")
            >>> for x in torch.randn(8, 8, 4):
            ...     model(x).square().mean().backward()
            >>> controller.mean_gradients()
            >>> norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            >>> optimizer.step()
            >>> controller.scale
            8.0
        """
        self._step_hooks.mean_gradients()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose backwards and steps are not training: neither counted, nor measured, nor scaled.

        An optimizer's step in it is that of the bare optimizer, at the present base learning rate, and the clock stays.
        Clear its gradients inside of the context.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> controller = anybatch.attach(optimizer, model=model, scale=4)
            >>> with controller.paused():                   # a penalty that comes every 16th step
            ...     model(torch.randn(8, 4)).square().mean().backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            >>> controller.steps, controller.tau
            (0, 0.0)
        """
        outer, self._step_hooks.paused = self._step_hooks.paused, True
        try:
            with nullcontext() if self._gradients is None else self._gradients.paused():
                yield
        finally:
            self._step_hooks.paused = outer

    def together(self) -> AbstractContextManager[None]:
        """A context whose backwards are one micro-batch: several losses with a `backward()` each.

        Their sum is measured, which takes a copy of each parameter's gradient.

        Raises:
            UsageError: `optimizer.step()` or `peek()` is called inside of it.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> controller = anybatch.attach(optimizer, model=model, scale="count")
            >>> for real, fake in zip(torch.randn(2, 8, 4), torch.randn(2, 8, 4)):      # two micro-batches
            ...     with controller.together():
            ...         (model(real).relu().mean() / 2).backward()
            ...         (-model(fake).mean() / 2).backward()
            >>> optimizer.step()
            >>> controller.count
            2
        """
        return nullcontext() if self._gradients is None else self._gradients.together()

    def observe(self, gradients: Sequence[Tensor]) -> None:
        """Use micro-batch gradients computed elsewhere, for example with `torch.func.vmap`, instead of backwards.

        `.grad` of each parameter becomes the mean over the n micro-batches.

        Args:
            gradients: One tensor `[n, *parameter.shape]` for each trained parameter, in the optimizer's order. It has
                each micro-batch's own mean gradient, not divided by n.

        Raises:
            InvalidValueError: wrong shapes.
            UsageError: under DDP, after a backward of the same step, or under a rule that does not count.
        """
        if self._gradients is None:
            raise UsageError("observe() has no effect under a rule that neither measures nor counts: leave it out.")
        if self._settings.reduction != "mean":
            raise UsageError('observe() sets .grad to the mean of the gradients: pass attach reduction="mean".')
        self._gradients.observe(gradients)

    # ---- records ----

    def log(self, **results: float) -> None:
        """Add the results of an evaluation to the record and its trackers, at this step and tau.

        Every rank may call it; rank 0's results are written.

        Args:
            results: Numbers by their names, such as `accuracy=0.93`.

        Raises:
            InvalidValueError: a result that is not a number, or has the name of one of a step's own numbers.
            UsageError: `attach` got no record on rank 0, or the controller is detached.
        """
        self._sinks.metrics(results, step=self.steps, tau=self.tau)

    def progress(self, *, console: Any = None) -> AbstractContextManager[None]:
        """A context with a progress bar in tau: gain, scale, learning rate and the time left.

        It is shown on rank 0 only, and only where standard error is a terminal.

        Args:
            console: A `rich.console.Console` to draw on.

        Raises:
            UsageError: rich is not installed.
        """
        return progress_bar(
            self.clock, shown=self._ranks.first, values=lambda: self._run.in_words(self.base_lr), console=console
        )

    # ---- state ----

    def state_dict(self) -> dict[str, float | int]:
        """The state of a run as a flat dictionary of numbers, the same at any scale and number of ranks.

        The first optimizer's own `state_dict()` has it too, in its first parameter group. Its `load_state_dict()`
        restores it, or `attach` does after that. So saving this state is needed only to have it apart.
        """
        self._step_hooks.restore()
        return {
            "version": STATE_VERSION,
            "parameters": sum(map(entries_of, self._members())) + self._ranks.elsewhere,
            "base_batch": self._settings.batch.base_batch or 0.0,
            **self._run.numbers(),
            "schedule_offset": self._drivers[0].offset if self._drivers else 0,
            "backwards": 0 if self._gradients is None else self._gradients.usual,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; load the states of the model, the optimizer and the scheduler as well.

        Raises:
            StateError: the state has other names or a newer version, or another model or base batch.
        """
        values = checked_state(state, mine=self.state_dict())
        self._run.adopt(values)
        self._step_hooks.forget()
        self._sinks.resume()
        if self._gradients is not None:
            self._gradients.usual = int(values["backwards"])
        for driver in self._drivers:
            driver.resume(offset=int(values["schedule_offset"]))

    def detach(self) -> None:
        """Remove every hook and close the record that `attach` opened; the optimizer is then as before `attach`.

        Before the end of the run, rank 0 prints one line about it.
        """
        self._step_hooks.restore()
        self._step_hooks.detach()
        self._stored.remove()
        remove_hooks(self._gradients, self._drivers)
        self._sinks.close()
        self._run.ending.report()
        for optimizer in self._optimizers:
            attached.discard(optimizer)
        self._attached = False

    # ---- uneven inputs ----

    def join_hook(self, **_: Any) -> JoinHook:
        """The hook of `torch.distributed.algorithms.Join` for a rank that has run out of data.

        Raises:
            UnsupportedError: no DDP, a `GradScaler`, a record by layer, or something that follows the clock.
        """
        return self._join.hook(
            followed=self.clock.subscribers > len(self._drivers), state=self.state_dict, adopt=self._catch_up
        )

    @property
    def join_device(self) -> torch.device:
        """DDP's device."""
        return self._join.device

    @property
    def join_process_group(self) -> Any:
        """DDP's process group."""
        return self._join.process_group

    def _catch_up(self, values: Mapping[str, float]) -> None:
        """Take another rank's state, schedule included."""
        self._run.adopt(values)
        self._step_hooks.forget()
        for driver in self._drivers:
            driver.catch_up()

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        total = "" if self.clock.total is None else f" of {self.clock.total:g}"
        numbers = {"scale": self.scale, "gain": self.gain, "learning rate": self.base_lr * self.lr_factor}
        rows = [("tau", f"{self.tau:.6g}{total}"), ("steps", f"{self.steps:,}"), ("skipped", f"{self.skipped:,}")]
        rows += [(name, f"{value:.4g}") for name, value in numbers.items() if not isnan(value)]
        if not isnan(self.noise_scale):
            unit = "base batches" if self._settings.batch.base_batch is None else "examples"
            rows.append(("noise scale", f"{self.noise_scale:.4g} {unit}"))
        return html_table(rows, header=("Controller", str(self.rule)))

    def __repr__(self) -> str:
        total = "" if self.clock.total is None else f" of {self.clock.total:g}"
        numbers = {"scale": self.scale, "gain": self.gain, "noise scale": self.noise_scale}
        known = "".join(f", {name} {value:.4g}" for name, value in numbers.items() if not isnan(value))
        if self.scale > 1 and not isnan(self.gain):
            known += f", an example is worth {self.gain / self.scale:.1%} of one at scale 1"
        if self._gradients is not None and self._gradients.sizes.text:
            known += f", {self._gradients.sizes.text}"
        if self._measured < 1:
            known += f", noise of {self._measured:.3g} of the parameters"
        detached = "" if self._attached else ", detached"
        return f"<Controller: tau {self.tau:.6g}{total}, {self.steps} steps{known}{detached}>"

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"A controller has no attribute {name!r} to set: set micro_batch or weight.")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            "A controller belongs to its optimizer's hooks, so it cannot be copied or pickled: copy the optimizer, "
            "attach another controller to the copy, and load this controller's state_dict() into that one."
        )
