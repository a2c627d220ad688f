"""GradientHooks: the norms of the gradients of every backward.

[Note: where norms are taken] A hook on each parameter gets every micro-batch's gradient before it is added to `.grad`.
This holds on one device, under DDP (before its reduction) and under `no_sync`. The norm of their mean is taken from
`.grad` in a callback at the end of the autograd engine's run. DDP has then averaged and written back, and the user has
not yet unscaled or clipped. So both norms are of the same gradients in the same units, and the user's communication
hook is unchanged. `window_norms` takes them.

Under FSDP2 the parameters of the optimizer are shards, on which no gradient hook runs. Hooks are on the unsharded
originals, the leaves. The shards have `.grad`, which FSDP has reduced in an earlier callback.

[Note: counting] A backward is one outermost run of the engine in which at least one parameter accumulated a gradient.
The largest number of gradients of one parameter is not a count: each expert or head may get only some micro-batches.
Re-entrant checkpointing runs the engine from inside of the engine: these nested runs belong to the backward around
them.

This module does not depend on the ranks and the reduction: `reduce` makes samples of a window.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from anybatch._errors import AnybatchWarning, InvalidValueError, UnsupportedError, UsageError
from anybatch._gradients.autograd import LAST, accumulates, at_end, check_not_captured, inside_a_backward, stream_of
from anybatch._gradients.fingerprint import GradientFingerprint, is_zero
from anybatch._gradients.norms import part_of
from anybatch._gradients.probe import Placement, Probe
from anybatch._gradients.sizes import Sizes
from anybatch._gradients.summed import SummedBackwards
from anybatch._gradients.window import Window
from anybatch._gradients.window_norms import WindowNorms

_DISCARDED = 10  # windows in a row without a step before a warning
_NO_STEP = (
    f"The gradients of {_DISCARDED} windows in a row were cleared without a call of optimizer.step(), so the clock "
    "stands. Call step() of the optimizer that was passed to attach. Where its step has another name, as SAM's "
    "second_step, pass attach the optimizer inside of it."
)


class GradientHooks:
    """Hooks on the parameters of optimizers; see the notes above.

    Args:
        parameters: Returns the parameters in the optimizers' present groups. Frozen ones are left out.
        measure: Whether norms are taken. Otherwise backwards are only counted.
        due: Returns, when a window begins, whether the averages take it as a sample.
        place: Returns where the gradients of parameters are measured. Default: on the parameters.
        reduced: Returns, at the end of a backward, whether `.grad` is averaged over several ranks. `None` on one
            rank.
        arrived: Returns, at the end of a backward, whether its gradients are in `.grad`.
        loss_scale: Returns the factor on the loss, a tensor of shape `[]`, or `None`.
        consecutive: Whether to keep a copy of the gradient for the one-gradient estimator.
        probes: Norms beside the Euclidean ones.
        sizes: The sizes of the micro-batches. `None` where they have no effect.
    """

    def __init__(
        self,
        parameters: Callable[[], Sequence[Tensor]],
        *,
        measure: bool,
        due: Callable[[], bool] = lambda: True,
        place: Callable[[Sequence[Tensor]], Sequence[Placement]] = lambda parameters: list(map(Placement, parameters)),
        reduced: Callable[[], bool] | None = None,
        arrived: Callable[[], bool] = lambda: True,
        loss_scale: Callable[[], Tensor | None] = lambda: None,
        consecutive: bool = False,
        probes: Sequence[Probe] = (),
        sizes: Sizes | None = None,
    ) -> None:
        self.sizes = Sizes() if sizes is None else sizes
        self._norms = WindowNorms(
            measure=measure,
            due=due,
            probes=probes,
            ranks=reduced is not None,
            loss_scale=loss_scale,
            consecutive=consecutive,
        )
        self._members = parameters
        self._place = place
        self._reduced = reduced
        self._arrived = arrived
        self._paused = False
        self._stray: Tensor | None = None  # a parameter that got a gradient while paused
        self._together: SummedBackwards | None = None
        self._before = 0  # backwards of the window before
        self._discarded = 0  # windows in a row whose gradients were cleared without a step
        self.windows = 0  # opened so far
        self._newest = -1  # the engine's last outermost run
        self._newest_hook = 0
        self.stamp = 0  # changes with everything that changes the result of `window()`
        self._leaves: list[weakref.ref[Tensor]] = []
        self._copies: list[tuple[float, float]] = []  # of each parameter, as in Placement
        self._hooks: list[Callable[[Tensor], None]] = []
        self._handles: list[RemovableHandle] = []
        self._fires: list[int] = []
        self._fingerprint = GradientFingerprint()
        self._open()
        self.follow()
        self._norms.spoilt = False
        for p in self._norms.parameters:
            if p.grad is not None and not is_zero(p.grad):
                self._fingerprint.foreign(p, origin="before attach")
                break

    def follow(self) -> bool:
        """Hook the parameters without a hook: of an added group, an unfrozen layer, replaced tensors.

        Their first window, whose backward may have run before the hooks, is counted and not measured. Parameters that
        have left the optimizers are dropped. A later hook of the user's may change the gradient after it is measured,
        so this hook is made the last one again.

        Returns:
            Whether all parameters were replaced, so that no backward of the window was seen.
        """
        if RemovableHandle.next_id != self._newest_hook:
            self._come_last()
        members = self._members()
        left = self._drop_left(members)
        known = {id(p) for p in self._norms.parameters}
        replaced = left and not known and self.pending == 0
        if new := [p for p in members if p.requires_grad and id(p) not in known]:
            self._hook_all(new, self._place(new), [0] * len(new))
        self._newest_hook = RemovableHandle.next_id
        return replaced

    def _hook_all(self, parameters: Sequence[Tensor], places: Sequence[Placement], fires: Sequence[int]) -> None:
        first = len(self._leaves)
        self._norms.follow(parameters, places)
        self._leaves.extend(weakref.ref(place.leaf) for place in places)
        self._copies.extend((place.sample_copies, place.mean_copies) for place in places)
        self._fires.extend(fires)
        self._hooks.extend(self._hook(i) for i in range(first, len(self._leaves)))
        self._handles.extend(p.leaf.register_hook(h) for p, h in zip(places, self._hooks[first:], strict=True))

    def _drop_left(self, members: Sequence[Tensor]) -> bool:
        """Drop the parameters that are in no group any more; their gradients are no part of this training."""
        present, alive = {id(p) for p in members}, self._norms.alive()
        if all(p is not None and id(p) in present for p in alive):
            return False
        parameters, places, fires = list[Tensor](), list[Placement](), list[int]()
        for p, leaf, copies, count in zip(alive, self._leaves, self._copies, self._fires, strict=True):
            if p is not None and id(p) in present and (tensor := leaf()) is not None:
                parameters.append(p)
                places.append(Placement(tensor, *copies))
                fires.append(count)
        for handle in self._handles:
            handle.remove()
        for each in (self._handles, self._hooks, self._leaves, self._copies, self._fires):
            each.clear()
        self._fingerprint.drop()
        self._norms.drop()
        self._hook_all(parameters, places, fires)
        return True

    def _come_last(self) -> None:
        for index, (held, handle) in enumerate(zip(self._leaves, self._handles, strict=True)):
            leaf = held()
            if leaf is not None and next(reversed(leaf._backward_hooks)) != handle.id:  # type: ignore[arg-type]
                handle.remove()
                self._handles[index] = leaf.register_hook(self._hooks[index])
                self._norms.spoilt = True

    @property
    def usual(self) -> int:
        """Number of backwards of the last window, where it saves reads; saved with the state."""
        return self._norms.usual

    @usual.setter
    def usual(self, value: int) -> None:
        self._norms.usual = value

    @property
    def loss_scale(self) -> Tensor | None:
        """The factor on the loss in the window's last backward."""
        return self._norms.scale

    @property
    def pending(self) -> int:
        """Number of backwards in the open window; 0 when there is none."""
        # Where every parameter is inside of re-entrant checkpoints, the backward around them calls no hook.
        return self._backwards or (max(self._fires, default=0) if self._nested_only else 0)

    @property
    def sizes_of_norms(self) -> dict[str, int]:
        """The size of each probe, by its name."""
        return self._norms.sizes

    def measured_by(self, name: str) -> bool:
        """Whether the further probe `name` measures the open window."""
        return self._norms.measured_by(name)

    def assume(self) -> None:
        """Take the number of backwards of the last window: all parameters are new, so no hook ran."""
        self._backwards = self._before
        self.sizes.count(self._before)
        self._norms.spoilt = True
        self.stamp += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose backwards are not training: they are neither counted nor measured."""
        if self._paused:
            yield
            return
        self._paused, before = True, self._fingerprint.value()
        self._task = self._counted = -1
        try:
            with self.sizes.paused():
                yield
        finally:
            self._paused, stray, self._stray = False, self._stray, None
            if stray is not None and (before is None or before != self._fingerprint.value()):
                self._fingerprint.foreign(stray, origin="a backward in controller.paused()")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context whose backwards are one micro-batch."""
        if self._together is not None:
            yield
            return
        self._together = together = SummedBackwards()
        self._task = self._counted = -1
        try:
            yield
            for index, total in together.sums.items() if self._norms.taken else ():
                self._norms.sample(self._fires[index] - 1, index, total)
            if self._norms.taken and together.sums:
                self._norms.remember(alone=self._alone, inverse_size=self.sizes.inverse_of_last)
        except BaseException:
            self._norms.spoilt = True
            raise
        finally:
            self._together = None
            self.sizes.forget()  # the forwards of further losses
            self.stamp += 1

    def observe(self, samples: Sequence[Tensor]) -> None:
        """Take n gradients, one tensor `[n, *shape]` a parameter, as n micro-batches; `.grad` becomes their mean."""
        if self._reduced is not None:
            raise UsageError("observe() works on one rank: under DDP the gradients must come from a backward.")
        parameters = self._norms.parameters
        if len(samples) != len(parameters):
            raise InvalidValueError(
                f"observe() takes one tensor for each of the {len(parameters)} trained parameters, got {len(samples)}."
            )
        if self.pending:
            raise UsageError("observe() gives a whole step's gradients: it cannot follow a backward of the same step.")
        if self.sizes.auto:
            raise UsageError('observe() has no forward, so micro_batch="auto" has no size: pass attach a number.')
        n = samples[0].shape[0]
        for p, sample in zip(parameters, samples, strict=True):
            if sample.shape != (n, *p.shape) or n == 0:
                raise InvalidValueError(
                    f"observe() needs tensors of shape [n, *parameter.shape] with n >= 1: got {list(sample.shape)} "
                    f"for a parameter {list(p.shape)}, n = {n}."
                )
        self._fingerprint.renewed()
        self.stamp += 1
        self._backwards = n
        self.sizes.forget()
        self.sizes.count(n)
        with torch.no_grad():
            for p, sample in zip(parameters, samples, strict=True):
                p.grad = sample.mean(0)
            self._norms.observe(samples)
            self._norms.remember(alone=n == 1, inverse_size=self.sizes.inverse_of_last)

    def window(self) -> Window:
        """The open window; `close()` it after the step.

        Raises:
            UsageError: `.grad` holds other gradients as well, or `together()` has not ended.
        """
        if self._together is not None:
            raise UsageError(
                "The sum of the backwards in controller.together() is known at the end of the block: call "
                "optimizer.step() and controller.peek() after it, not in it."
            )
        self._fingerprint.end()
        if self.pending and not self._here:
            raise UsageError(
                "The gradients of this step are not averaged: FSDP2 keeps those of a backward without synchronisation "
                "apart. Call model.set_requires_gradient_sync(True) before the last backward of a step."
            )
        return self._norms.window(self.pending, self._fires, shares=self.sizes.shares)

    def emptied(self) -> bool:
        """Whether the open window's gradients were cleared between the last backward and the step."""
        if not (self.pending and self._here):
            return False
        return all(p.grad is None for p in self._norms.parameters) or (self._fingerprint.emptied() and self._cleared())

    def holds(self) -> bool:
        """Whether `.grad` holds gradients of the open window."""
        return self.pending > 0 and not self._cleared()

    def changed(self) -> bool:
        """Whether something has written to `.grad` since the last backward; by one parameter's version."""
        return self._fingerprint.changed()

    def check_joined(self, *, joined: bool) -> None:
        """Raise if a step in `Join` has several synchronised backwards: ranks that have run out match one.

        Raises:
            UsageError: it has.
        """
        if joined and self._synchronised > 1:
            raise UsageError(
                f"{self._synchronised} backwards of this step were synchronised. In Join a rank that has run out of "
                "data takes part in one all-reduce a step: run all but the last backward of a step, with its forward, "
                "inside of model.no_sync()."
            )

    def average(self, divisor: float) -> None:
        """Divide `.grad` by `divisor`, which makes it the mean over the micro-batches."""
        with torch.no_grad():
            torch._foreach_div_(self._norms.grads(), divisor)

    def close(self, *, forget: bool = False) -> None:
        """End the window after its step. `forget` drops the previous gradient too: it was not finite."""
        self._fingerprint.stepped()
        self._norms.close(self.pending, forget=forget)
        self._before = self.pending
        self._discarded = 0
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
        self.windows += 1
        self._synchronised = 0  # backwards of the window that left the average in `.grad`
        self._fires = [0] * len(self._leaves)
        self.sizes.open()
        self._backwards = 0
        self._nested_only = False
        self._here = True  # whether `.grad` has the last backward
        self._norms.open()
        self._tasks: set[int] = set()  # the runs of the engine that have begun and not ended
        self._task = -1  # the run whose gradients the hooks measure without `_enter`
        self._counted = -1  # the run that is only counted, and has been
        self._fingerprint.open()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        current_task = torch._C._current_graph_task_id
        # torch's garbage collector does not visit hooks of tensors that C++ refers to, as DDP does to the parameters. A
        # strong reference would keep them, and the process group's threads, until the process ends.
        reference = weakref.ref(self)
        queued, queue = self._norms.euclidean.queued[index], self._norms.euclidean.queues[index]
        leaf_of = self._leaves[index]
        distributed = hasattr(leaf_of(), "_local_tensor")
        append, note = queue.waiting.append, queue.versions.append
        device = None if (leaf := leaf_of()) is None or not leaf.is_cuda else leaf.device
        streams = queue.streams

        def hook(grad: Tensor) -> None:  # runs for each parameter and backward: the hottest lines of the library
            hooks = reference()
            if hooks is None:
                return
            task = current_task()
            if task != hooks._task and (task == hooks._counted or not hooks._enter(task, index, grad)):
                return
            hooks._fires[index] += 1
            if distributed and (leaf := leaf_of()) is not None:
                grad = part_of(grad, leaf)
            if device is not None:
                streams.add((device, stream_of(device)))
            if queued and not grad.is_sparse:
                append(grad)
                note(grad._version)
            else:
                queue.take(grad)

        return hook

    def _enter(self, task: int, index: int, grad: Tensor) -> bool:
        """Whether the hook continues: not where nothing is accumulated, while paused, or if this method has done it."""
        if self._paused:
            leaf = self._leaves[index]()
            if self._stray is None and leaf is not None and accumulates(leaf):
                self._stray = self._norms.alive()[index]
            return False
        if task not in self._tasks:
            leaf = self._leaves[index]()
            if leaf is None or not accumulates(leaf):
                return False
            if self.pending == 0 and not self._tasks and self._drop_left(self._members()):
                self._norms.spoilt = False  # no gradient of this window was missed
                for held, hook in zip(self._leaves, self._hooks, strict=True):
                    if held() is leaf:
                        hook(grad)
                return False
            parameter = self._norms.alive()[index]
            self._begin_backward(task, leaf if parameter is None else parameter)
        if self._together is not None:
            self._fires[index] += self._together.add(index, self._part(index, grad))
            return False
        if not self._norms.taken:
            self._fires[index] += 1
            if task == self._newest:  # not nested: one gradient is enough to count it
                self._counted = task
            return False
        if not self._norms.simple:
            self._fires[index] += 1
            self._norms.sample(self._fires[index] - 1, index, self._part(index, grad))
            return False
        self._task = task
        return True

    def _part(self, index: int, grad: Tensor) -> Tensor:
        leaf = self._leaves[index]()
        return grad if leaf is None else part_of(grad, leaf)

    def _begin_backward(self, task: int, parameter: Tensor) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedError("compiled autograd, in which no hook runs: run the backward without it.")
        check_not_captured(parameter)
        nested = inside_a_backward()
        if not nested:
            if task < self._newest:
                raise UsageError(
                    "Two backwards run at once on parameters of one optimizer, from two threads: .grad mixes their "
                    "gradients. Run them one after the other."
                )
            self._newest = task
            self._norms.interrupted |= bool(self._tasks)  # the backward before has raised
            self._tasks.clear()
        if not self._tasks:
            self._reopen()
            self._fingerprint.begin(parameter)
        if self.pending == 0:
            self._norms.begin()
        self._tasks.add(task)
        if self._norms.taken:
            at_end(self._norms.measure)  # while DDP's last reduction is pending
        at_end(lambda: self._end_backward(task, nested=nested), chain=LAST)

    def _reopen(self) -> None:
        """Begin a new window if the gradients of the open one were cleared."""
        if self._fingerprint.cleared(self.pending) and (self.pending == 0 or self._cleared()):
            if self.pending:  # no optimizer stepped: for example a GradScaler skipped it as not finite
                self._norms.forget()
                self._discarded += self._norms.scale is None  # a GradScaler skips some by itself
                if self._discarded == _DISCARDED:
                    warnings.warn(_NO_STEP, AnybatchWarning, stacklevel=2)
            self._open()

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
        self._synchronised += self._reduced is not None and self._reduced()
        self._fingerprint.confirm(arrived=self._here)
        self.sizes.count(self.pending, together=self._together is not None)
        self._norms.scaled()
        if self._norms.taken:
            alone = self._alone
            summed = not alone and (self._reduced is None or self._reduced())
            self._norms.ended(self.pending, summed=summed)
            if self._together is None:
                self._norms.remember(alone=alone, inverse_size=self.sizes.inverse_of_last)

    @property
    def _alone(self) -> bool:
        """Whether the window has one micro-batch on one rank, whose gradient is `.grad`."""
        return self._reduced is None and self.pending == 1

    def _cleared(self) -> bool:
        """Whether no gradient is left; checked where the fingerprint's gradient was cleared.

        A user may clear that one alone: DINO drops the gradient of its last layer for an epoch.
        """
        return all(p.grad is None or is_zero(p.grad) for p in self._norms.parameters)
