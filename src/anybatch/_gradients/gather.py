"""Gather: watches every backward of an optimizer's parameters and, at the step, tells what it saw.

[Note: where norms are taken] A hook on each parameter sees every micro-batch's gradient before it is added to `.grad`,
on one device, under DDP (before its reduction) and under `no_sync` alike; `samples` has their norms. The squared norm
of their sum is taken from `.grad` in a callback that the autograd engine runs at the very end of a backward: after DDP
has averaged and written back, before the user unscales or clips. So both norms are of the same gradients in the same
units, and any communication hook of the user's runs as it is.

[Note: one read] Which backward is a window's last is known only at the step, when the user may have clipped; so the
norm of the sum is taken at the end of each that may be: on one process, from as many on as the window before had. Where
a window ends before that, the sum is read at the step, if it still is what the last backward left; else the window is
not measured.

Under FSDP2 the parameters of the optimizer are shards, on which no gradient hook ever fires. Their unsharded originals,
the leaves, have the hooks; `.grad` is read from the shards, after FSDP has reduced it in an earlier callback.

[Note: counting] A backward is one outermost run of the engine in which at least one parameter accumulated a gradient;
not the largest number of gradients that a parameter got, for experts and heads may each see only some micro-batches.
Re-entrant checkpointing runs the engine from inside of the engine: such nested runs belong to the backward around them.

Nothing here knows what the observed gradients are a part of: `_reduce` turns a window into the norms of samples.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from anybatch._errors import InvalidValueError, UnsupportedError, UsageError
from anybatch._gradients.autograd import LAST, accumulates, at_end, check_not_captured, inside_a_backward
from anybatch._gradients.consecutive import Consecutive
from anybatch._gradients.layers import Layers
from anybatch._gradients.metric import Metric
from anybatch._gradients.norms import total_squared_norm
from anybatch._gradients.samples import Samples
from anybatch._gradients.sizes import Sizes
from anybatch._gradients.together import Together
from anybatch._gradients.trace import Trace
from anybatch._gradients.weighing import Weighing
from anybatch._gradients.window import Pair, Weighed, Window
from anybatch._gradients.witness import Witness, is_zero, local_of


class Gather:
    """Hooks on `parameters`; see the notes above.

    Args:
        parameters: those of one optimizer; the ones that need no gradient are passed over.
        measure: whether norms are taken; else backwards are only counted.
        due: asked when a window opens: whether its norms are; else its backwards are only counted.
        leaves: gives the tensor on which a parameter's gradient arrives; the parameter itself without FSDP.
        reduced: tells, at the end of a backward, whether `.grad` has been averaged over several ranks; `None` on one
            rank.
        arrived: tells, at the end of a backward, whether its gradients are in `.grad`.
        loss_scale: gives the factor on the loss, a tensor of shape `[]`, or `None` where there is none.
        consecutive: keep a copy of the gradient for the one-gradient estimator.
        metric: Adam's, where norms are taken in it too.
        sizes: of the micro-batches; `None` where they do not matter.
        layers: the norms by layer, where steps are looked at.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        measure: bool,
        due: Callable[[], bool] = lambda: True,
        leaves: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda parameters: parameters,
        reduced: Callable[[], bool] | None = None,
        arrived: Callable[[], bool] = lambda: True,
        loss_scale: Callable[[], Tensor | None] = lambda: None,
        consecutive: bool = False,
        metric: Metric | None = None,
        sizes: Sizes | None = None,
        layers: Layers | None = None,
    ) -> None:
        self.sizes = Sizes() if sizes is None else sizes
        self._measures = measure
        self._due = due
        self._measuring = measure  # this window
        self._leaves_of = leaves
        self._reduced = reduced
        self._arrived = arrived
        self._loss_scale = loss_scale
        self._consecutive = Consecutive() if consecutive else None
        self._weighing = None if metric is None else Weighing(metric)
        self._layers = layers if measure else None
        self._looking: Layers | None = None  # the same in a window that is looked at
        self._paused = False
        self._stray: Tensor | None = None  # a parameter that got a gradient while paused
        self._together: Together | None = None
        self.usual = 0  # backwards of the last window, where that saves reads
        self._newest = -1  # the engine's last outermost run
        self._newest_hook = 0
        self.stamp = 0  # changes with all that alters what `window()` would say
        self._parameters: list[Tensor] = []
        self._known: set[int] = set()  # the parameters' identities, which stay theirs while they are held here
        self._leaves: list[Tensor] = []
        self._hooks: list[Callable[[Tensor], None]] = []
        self._handles: list[RemovableHandle] = []
        self._fires: list[int] = []
        self._waits: list[bool] = []  # for each parameter, whether its gradient may
        self._samples = Samples()
        self._plain = reduced is None  # whether `.grad` is the parameters' own, which nothing but the user writes to
        self._witness = Witness()
        self._observed_square: Tensor | None = None
        self._grad_square: Tensor | None = None
        self._unmeasured = False
        self._open()
        self.follow(parameters)
        self._unmeasured = False
        for p in self._parameters:
            if p.grad is not None and not is_zero(p.grad):
                self._witness.foreign(p, origin="before attach")
                break

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Hook the parameters that are not hooked yet: a group added, a layer unfrozen. Their first window, whose
        backward may have come before the hooks, is counted and not measured.

        A hook of the user's that came after ours changes what we have measured: ours is made the last again.
        """
        if RemovableHandle.next_id != self._newest_hook:
            self._come_last()
        new = [p for p in parameters if p.requires_grad and id(p) not in self._known]
        leaves = self._leaves_of(new) if new else ()
        if new and self._weighing is not None:
            self._weighing.follow(new, leaves)
        if new and self._layers is not None:
            self._layers.follow(new, leaves)
        for p, leaf in zip(new, leaves, strict=True):
            index = len(self._parameters)
            self._parameters.append(p)
            self._known.add(id(p))
            self._leaves.append(leaf)
            self._plain = self._plain and leaf is p
            self._fires.append(0)
            waits = self._measures and self._samples.admits(leaf)
            self._waits.append(waits)
            self._hooks.append(self._hook(index, waits=waits))
            self._handles.append(leaf.register_hook(self._hooks[index]))
            self._unmeasured = True
        self._newest_hook = RemovableHandle.next_id

    def _come_last(self) -> None:
        for index, (leaf, handle) in enumerate(zip(self._leaves, self._handles, strict=True)):
            if next(reversed(leaf._backward_hooks)) != handle.id:  # type: ignore[arg-type]
                handle.remove()
                self._handles[index] = leaf.register_hook(self._hooks[index])
                self._unmeasured = True

    @property
    def pending(self) -> int:
        """Backwards seen in the open window; 0 when there is none."""
        # Where every parameter is inside of re-entrant checkpoints, the backward around them never shows.
        return self._backwards or (max(self._fires, default=0) if self._nested_only else 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A stretch whose backwards are not training: not counted, not measured."""
        if self._paused:
            yield
            return
        self._paused, before = True, self._witness.fingerprint()
        self._task = self._told = -1
        try:
            with self.sizes.paused():
                yield
        finally:
            self._paused, stray, self._stray = False, self._stray, None
            if stray is not None and (before is None or before != self._witness.fingerprint()):
                self._witness.foreign(stray, origin="a backward in controller.paused()")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stretch whose backwards are one micro-batch."""
        if self._together is not None:
            yield
            return
        self._together = together = Together()
        self._task = self._told = -1
        try:
            yield
            for index, total in together.sums.items() if self._measuring else ():
                self._measure_sample(self._fires[index] - 1, index, total)
            if self._measuring and together.sums:
                self._remember(single=self._alone)
        except BaseException:
            self._unmeasured = True
            raise
        finally:
            self._together = None

    def observe(self, samples: Sequence[Tensor]) -> None:
        """Take n gradients, one tensor `[n, *shape]` a parameter, as n micro-batches; `.grad` becomes their mean."""
        if self._reduced is not None:
            raise UsageError("observe() works on one rank: under DDP the gradients must come from a backward.")
        if len(samples) != len(self._parameters):
            raise InvalidValueError(
                f"observe() takes one tensor for each of the {len(self._parameters)} trained parameters, "
                f"got {len(samples)}."
            )
        if self.pending:
            raise UsageError("observe() gives a whole step's gradients: it cannot follow a backward of the same step.")
        if self.sizes.auto:
            raise UsageError('observe() sees no forward, so micro_batch="auto" is nothing to it: give attach a number.')
        n = samples[0].shape[0]
        for p, sample in zip(self._parameters, samples, strict=True):
            if sample.shape != (n, *p.shape) or n == 0:
                raise InvalidValueError(
                    f"observe() needs tensors of shape [n, *parameter.shape] with n >= 1: got {list(sample.shape)} "
                    f"for a parameter {list(p.shape)}, n = {n}."
                )
        self._witness.renewed()
        self.stamp += 1
        self._backwards = n
        self._begin_window()
        self.sizes.forget()
        self.sizes.count(n)
        with torch.no_grad():
            for p, sample in zip(self._parameters, samples, strict=True):
                p.grad = sample.mean(0)
            if self._measuring:
                self._observed_square = total_squared_norm(samples) / n**2
                if self._weighing is not None:
                    self._weighing.open()
                    self._weighing.samples(samples)
                if self._looking is not None:
                    self._looking.samples(samples)
                self._read_sum()
            self._remember(single=n == 1)

    def window(self) -> Window:
        """What the open window holds; `close()` it after the step.

        Raises:
            UsageError: `.grad` holds something else as well.
        """
        self._witness.end()
        if self.pending and not self._here:
            raise UsageError(
                "The gradients of this step are not averaged: FSDP2 holds back those of a backward without "
                "synchronisation. The last one before optimizer.step() needs model.set_requires_gradient_sync(True)."
            )
        backwards = self.pending
        self._samples.measure()
        measured = self._measuring and not self._unmeasured and self._samples.valid and backwards > 0
        if measured and self._trace is not None and self._grad_square is None:
            if self._trace.left(self._grads()):
                self._read_sum()
            else:  # what is not finite must be known for the step to be skipped
                measured = not bool(self._samples_square().isfinite())
        weighed = None if self._weighing is None else Weighed()
        layers = None
        # Over several ranks at each step: one that was given another clock is told so by an all-reduce of one size.
        if self._layers is not None and (self._reduced is not None or self._layers.due()):
            layers = self._layers.squares(self._fires, known=measured and self._looking is not None)
        if not measured:
            return Window(backwards, self.sizes.shares, None, None, None, weighed, layers)
        samples, grad, pair = self._samples_square(), self._grad_square, self._pair
        if grad is None and self._reduced is None:  # one backward on one rank: the sample is the sum
            grad = samples
        if self._weighing is not None:
            weighed = self._weighing.squares(self._fires)
        if self._scale is not None:
            unit = self._scale.to(samples.device, torch.float64).square()
            samples, grad = samples / unit, None if grad is None else grad / unit
            pair = None if pair is None else Pair(pair.mean_square / unit, pair.square_mean / unit)
            weighed = None if weighed is None else weighed.over(unit)
            layers = None if layers is None else layers.over(unit)
        return Window(backwards, self.sizes.shares, samples, grad, pair, weighed, layers)

    def emptied(self) -> bool:
        """Whether the open window's gradients are gone: cleared between the last backward and the step."""
        if not (self.pending and self._here):
            return False
        return all(p.grad is None for p in self._parameters) or (self._witness.emptied() and self._cleared())

    def average(self, divisor: float) -> None:
        """Make `.grad`, the sum over the micro-batches divided by `divisor`, their mean."""
        if self.pending not in (0, divisor):
            with torch.no_grad():
                torch._foreach_div_(self._grads(), self.pending / divisor)

    def close(self, *, forget: bool = False) -> None:
        """The step was taken. `forget` drops the previous gradient too: it was not finite."""
        self._witness.stepped()
        if forget:
            if self._consecutive is not None:
                self._consecutive.forget()
        elif self._plain:
            self.usual = self.pending
        self._unmeasured = False
        self._open()

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self.sizes.detach()
        self._handles.clear()

    # ---- the window ----

    def _open(self) -> None:
        self.stamp += 1
        self._fires = [0] * len(self._parameters)
        self.sizes.open()
        self._backwards = 0
        self._nested_only = False
        self._here = True  # whether `.grad` has the last backward
        self._samples.clear()
        self._observed_square = None
        self._grad_square = None
        self._trace: Trace | None = None  # of the sum, where its norm is taken later, if at all
        if self._weighing is not None:
            self._weighing.clear()
        if self._looking is not None:
            self._looking.clear()
        self._looking = None
        self._pair: Pair | None = None
        self._tasks: set[int] = set()  # the engine's runs that have begun and not ended
        self._task = -1  # the one whose gradients are measured in the plain way now
        self._told = -1  # the one that is only counted, and is
        self._witness.open()
        self._scale: Tensor | None = None

    def _hook(self, index: int, *, waits: bool) -> Callable[[Tensor], None]:
        current_task = torch._C._current_graph_task_id
        # torch's garbage collector does not look into hooks of what C++ holds too, as DDP does the parameters: a strong
        # reference would keep them, and the process group's threads, alive for good.
        reference = weakref.ref(self)
        samples, wait, note = self._samples, self._samples.waiting.append, self._samples.versions.append

        def hook(grad: Tensor) -> None:  # runs once a parameter and backward: the hottest lines of the library
            gather = reference()
            if gather is None:
                return
            task = current_task()
            if task != gather._task and (task == gather._told or not gather._enter(task, index, grad)):
                return
            gather._fires[index] += 1
            if waits and not grad.is_sparse:
                wait(grad)
                note(grad._version)
            else:
                samples.take(grad)

        return hook

    def _enter(self, task: int, index: int, grad: Tensor) -> bool:
        """Whether the hook goes on: not where nothing is accumulated, while paused, or where all is done here."""
        if self._paused:
            if self._stray is None and accumulates(self._leaves[index]):
                self._stray = self._parameters[index]
            return False
        if task not in self._tasks:
            if not accumulates(self._leaves[index]):
                return False
            self._begin_backward(task, self._parameters[index])
        if self._together is not None:
            self._fires[index] += self._together.add(index, grad)
            return False
        if not self._measuring:
            self._fires[index] += 1
            if task == self._newest:  # not nested: one gradient tells all there is to count
                self._told = task
            return False
        if self._weighing or self._looking or not self._samples.patient:
            self._fires[index] += 1
            self._measure_sample(self._fires[index] - 1, index, grad)
            return False
        self._task = task
        return True

    def _measure_sample(self, row: int, index: int, grad: Tensor) -> None:
        """Take the norms of what parameter `index` got from micro-batch `row`."""
        if self._waits[index] and self._samples.patient and not grad.is_sparse:
            self._samples.wait(grad)
        else:
            self._samples.take(grad)
        if self._weighing is not None:
            self._weighing.sample(row, index, grad)
        if self._looking is not None:
            self._looking.sample(row, index, grad)

    def _begin_backward(self, task: int, parameter: Tensor) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedError("compiled autograd: its graph has no room for what a backward shows")
        check_not_captured(parameter)
        nested = inside_a_backward()
        if not nested:
            if task < self._newest:
                raise UsageError(
                    "Two backwards run at once on parameters of one optimizer, from two threads: their gradients mix "
                    "in .grad, and nothing can tell them apart. Run them one after the other."
                )
            self._newest = task
            self._tasks.clear()
        if not self._tasks and self._witness.cleared(self.pending) and (self.pending == 0 or self._cleared()):
            self._open()
        self._witness.begin(parameter)
        if self.pending == 0:
            self._begin_window()
            if self._weighing is not None and self._measuring:
                self._weighing.open()
        self._tasks.add(task)
        if self._measuring:
            at_end(self._samples.measure)  # while DDP's last reduction is under way
        at_end(lambda: self._end_backward(task, nested=nested), chain=LAST)

    def _end_backward(self, task: int, *, nested: bool) -> None:
        self._tasks.discard(task)
        self.stamp += 1
        if nested:
            self._nested_only = self._backwards == 0
        else:
            if self._together is None or self._together.first():
                self._backwards += 1
            self._nested_only = False
        self._here = self._arrived()
        self._witness.confirm(arrived=self._here)
        self.sizes.count(self.pending)
        if not self._measuring:
            return
        scale = self._loss_scale()
        self._scale = None if scale is None else scale.clone()  # the scaler changes its own tensor in place
        self._grad_square = self._trace = None
        if not self._alone and (self._reduced is None or self._reduced()):
            if self._plain and self.pending < self.usual and (grads := self._grads()):
                self._trace = Trace(grads)
            else:
                self._read_sum()
        if self._together is None:
            self._remember(single=self._alone)

    def _begin_window(self) -> None:
        """Whether its norms are taken, and which."""
        look = self._measures and self._layers is not None and self._layers.due()
        self._looking = self._layers if look else None
        self._measuring = self._measures and (look or self._due())

    def _read_sum(self) -> None:
        self._grad_square = total_squared_norm(self._grads())
        if self._weighing is not None:
            self._weighing.grads()
        if self._looking is not None:
            self._looking.grads()

    @property
    def _alone(self) -> bool:
        """Whether the window has one micro-batch on one rank, whose gradient is `.grad`."""
        return self._reduced is None and self.pending == 1

    def _cleared(self) -> bool:
        """Whether no gradient is left; to be asked where the witness's is gone, for it may be the only one: DINO drops
        that of its last layer for an epoch.
        """
        return all(p.grad is None or is_zero(p.grad) for p in self._parameters)

    def _grads(self) -> list[Tensor]:
        """This rank's part of every `.grad`."""
        return [local_of(p.grad) for p in self._parameters if p.grad is not None]

    def _samples_square(self) -> Tensor:
        if self._observed_square is not None:
            return self._observed_square
        most = max(self._fires)
        if most > self.pending:
            raise UsageError(
                "A parameter got two gradients in one backward: a layer that is used twice inside of re-entrant "
                "checkpoints. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        return self._samples.total()

    def _remember(self, *, single: bool) -> None:
        if self._consecutive is None:
            return
        if single:
            grads = {index: local_of(p.grad) for index, p in enumerate(self._parameters) if p.grad is not None}
            self._pair = self._consecutive.pair(grads)
        else:
            self._consecutive.forget()
