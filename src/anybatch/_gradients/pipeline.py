"""Pipeline parallelism: the stages of `torch.distributed.pipelining`, on one rank or several for each stage.

A schedule runs M micro-batches through the stages. Every rank holds the parameters of its own stages, so that norms are
summed over all ranks and micro-batches are counted once: N = M times the number of data-parallel ranks. Backwards are
not counted, since a rank has one for each stage, and a zero-bubble schedule splits each in two. One call of
`schedule.step()` is M micro-batches. With `scale_grads=True`, torch's default, the schedule divides `.grad` by M at the
end of the call, after the hooks have seen the micro-batches' own gradients.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import UnsupportedError, UsageError
from anybatch._gradients.autograd import accumulates, at_end
from anybatch._gradients.engine import Engine, engine_of
from anybatch._gradients.hooks import GradientHooks
from anybatch._gradients.norms import part_of
from anybatch._gradients.probe import Placement
from anybatch._gradients.reduce import Ranks, Reduction
from anybatch._gradients.window import Norms, Window


def is_pipeline(model: object) -> bool:
    """Whether `model` is a schedule of `torch.distributed.pipelining`."""
    module = sys.modules.get("torch.distributed.pipelining.schedules")
    return module is not None and isinstance(model, module._PipelineSchedule)


def stages_of(schedule: Any) -> nn.ModuleList:
    """The modules of this rank's stages."""
    return nn.ModuleList([stage.submod for stage in _stages(schedule)])


def _stages(schedule: Any) -> list[Any]:
    return list(schedule._stages) if hasattr(schedule, "_stages") else [schedule._stage]


def pipeline_engine(
    schedule: Any,
    parameters: Sequence[Tensor],
    process_group: dist.ProcessGroup | None,
    *,
    members: Sequence[Tensor],
    reduction: Reduction,
    grad_scaler: torch.amp.GradScaler | None,
) -> Engine:
    """The engine of a rank's stages: plain modules, or each under DDP, FSDP2 or tensor parallelism; a collective.

    Args:
        schedule: The schedule of this rank.
        parameters: Those that are trained on this rank.
        process_group: All ranks of the training; the default group if `None`.
        members: All parameters of the optimizers of this rank.
        reduction: As for `attach`.
        grad_scaler: As for `attach`.

    Raises:
        UnsupportedError: on any rank, a combination that torch or anybatch does not support.
        UsageError: on any rank, stages that nothing averages, or arguments that contradict the schedule.
    """
    group = process_group if process_group is not None else dist.group.WORLD
    across, world = dist.get_world_size(_stages(schedule)[0].group), dist.get_world_size(group)  # of one, of all
    inner, error = Engine(Ranks(), place=lambda new: list(map(Placement, new)), reduced=None), None
    try:
        _check_arguments(schedule, reduction, grad_scaler)
        inner = _engine_of_stages(schedule, parameters, across) or inner
    except (UnsupportedError, UsageError) as raised:
        error = raised
    own = sum(p.numel() for p in members)
    found: list[Any] = [None] * world
    dist.all_gather_object(found, (error, inner.ranks.size * inner.ranks.model, own), group=group)
    if error := error or next((each for each, _, _ in found if each is not None), None):
        raise error
    for rank, (_, sharing, _) in enumerate(found):
        if sharing * across != world:
            raise UsageError(
                f"{world} ranks train this pipeline of {across} ranks, so {world / across:g} should share each stage, "
                f"and {sharing} share that of rank {rank}. Wrap each stage's module in DistributedDataParallel, "
                "fully_shard or parallelize_module over the ranks that hold the same stage, or pass attach the "
                "process_group of one pipeline."
            )
    elsewhere = sum(numbers for _, _, numbers in found) * across // world - own
    ranks = Ranks(group, inner.ranks.size, replicated=False, model=inner.ranks.model * across, elsewhere=elsewhere)
    return replace(inner, ranks=ranks, reduced=lambda: True, arrived=lambda: True, ddp=None)


def _engine_of_stages(schedule: Any, parameters: Sequence[Tensor], across: int) -> Engine | None:
    """The engine that averages the stages of this rank over the ranks with the same ones; `None` where none does."""
    model = stages_of(schedule)
    averaged = {id(p) for m in model.modules() if isinstance(m, DistributedDataParallel) for p in m.parameters()}
    if averaged and (left := sum(id(p) not in averaged for p in parameters)):
        raise UsageError(
            f"{left} of the {len(parameters)} trained parameters of this rank's stages are outside of "
            "DistributedDataParallel, so nothing averages them: wrap the module of each stage."
        )
    if averaged and _splits(schedule):
        raise UnsupportedError(
            f"{type(schedule).__name__} computes the gradients of weights in a backward of their own, in which "
            "DistributedDataParallel averages nothing: the ranks would train different models. Use fully_shard for the "
            "module of each stage, or Schedule1F1B."
        )
    if not averaged and not any(hasattr(p, "device_mesh") for p in parameters):
        return None
    return engine_of(model, parameters, None, pipelines=across)


def _splits(schedule: Any) -> bool:
    """Whether the gradients of weights have a backward of their own, as in a zero-bubble schedule."""
    orders = [getattr(schedule, name, None) or {} for name in ("pipeline_order", "pipeline_order_with_comms")]
    actions = [action for order in orders for of_rank in order.values() for action in of_rank if action is not None]
    return any(action.computation_type.name == "BACKWARD_WEIGHT" for action in actions)


def _check_arguments(schedule: Any, reduction: Reduction, grad_scaler: torch.amp.GradScaler | None) -> None:
    """Raise if arguments of `attach` contradict the schedule."""
    if schedule.scale_grads and reduction != "mean":
        raise UsageError(
            f"attach was given reduction={reduction!r}, and the schedule has scale_grads=True: it divides .grad by its "
            f"{schedule._n_microbatches} micro-batches, so .grad is their mean already. Leave reduction out, or make "
            "the schedule with scale_grads=False."
        )
    if grad_scaler is None or not grad_scaler.is_enabled():
        return
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    if not isinstance(grad_scaler, ShardedGradScaler):
        raise UsageError(
            f"A {type(grad_scaler).__name__} checks the gradients of this rank's stages alone, so that in a pipeline "
            "some ranks would skip a step which others take. Use "
            "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler, which reduces the check over all ranks."
        )


class PipelineHooks(GradientHooks):
    """Hooks on the parameters of a rank's stages; a window is one call of `schedule.step()`, or several.

    The method of the schedule that runs its micro-batches is replaced on this object, until `detach`.
    """

    def __init__(self, schedule: Any, parameters: Callable[[], Sequence[Tensor]], **options: Any) -> None:
        self._running = False
        super().__init__(parameters, **options)
        self._schedule = schedule
        run, reference = schedule._step_microbatches, weakref.ref(self)

        def run_and_measure(*args: Any, **kwargs: Any) -> Any:
            hooks = reference()
            if hooks is None or not schedule._has_backward or hooks._paused:
                return run(*args, **kwargs)
            hooks._begin()
            try:
                found = run(*args, **kwargs)
            except BaseException:
                hooks._running, hooks._norms.spoilt = False, True
                raise
            hooks._end()
            return found

        schedule._step_microbatches = run_and_measure

    def detach(self) -> None:
        """Remove every hook."""
        self._schedule.__dict__.pop("_step_microbatches", None)
        super().detach()

    def window(self) -> Window:
        """The open window, with the micro-batches' gradients as parts of their mean."""
        window = super().window()
        if not self._schedule.scale_grads:
            return window
        norms = {
            name: Norms(each.samples / self._schedule._n_microbatches**2, each.mean)
            for name, each in window.norms.items()
        }
        return replace(window, norms=norms)

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        reference, current_task = weakref.ref(self), torch._C._current_graph_task_id

        def hook(grad: Tensor) -> None:
            hooks = reference()
            if hooks is None or grad.is_meta:  # torch infers shapes with meta tensors
                return
            if not hooks._running:
                hooks._outside(index)
                return
            leaf = hooks._leaves[index]()
            hooks._fires[index] += 1
            if hooks._norms.taken and leaf is not None:
                hooks._norms.sample(hooks._fires[index] - 1, index, part_of(grad, leaf))
                task = current_task()
                if task != hooks._task:  # later gradients may be added to this tensor
                    hooks._task = task
                    at_end(hooks._norms.measure)

        return hook

    def _outside(self, index: int) -> None:
        """Raise in a backward outside of the schedule: its gradients are no micro-batch's."""
        leaf = self._leaves[index]()
        if not self._paused and leaf is not None and accumulates(leaf):
            raise UsageError(
                "A backward outside of schedule.step() adds to .grad, and no micro-batch has its gradients: add this "
                "loss to the schedule's loss_fn, or run its backward inside of `with controller.paused():`, and clear "
                "its gradients."
            )

    def _begin(self) -> None:
        """Begin a call of the schedule."""
        self._reopen()
        parameters = self._norms.parameters
        if self.pending and self._schedule.scale_grads:
            raise UsageError(
                "schedule.step() was called twice before a step, and with scale_grads=True each call divides all of "
                ".grad, so the gradients of the first are divided twice. Make the schedule with scale_grads=False, and "
                "divide the loss by the number of micro-batches of all calls, or pass attach reduction='sum'."
            )
        if self.pending == 0:
            if any(p.grad is not None and bool(p.grad.count_nonzero()) for p in parameters[:1]):
                raise UsageError(
                    "The gradients of the last optimizer step were not cleared, so .grad mixes two steps: call "
                    "optimizer.zero_grad() after optimizer.step()."
                )
            self._norms.begin()
        self._fingerprint.begin(parameters[0])
        self._running = True

    def _end(self) -> None:
        """End a call of the schedule, which has averaged `.grad` over the data-parallel ranks."""
        self._running = False
        self.stamp += 1
        self._backwards += self._schedule._n_microbatches
        self._fingerprint.confirm(arrived=True)
        self.sizes.count(self._backwards)
        self._norms.scaled()
        if self._norms.taken:
            self._norms.ended(self._backwards, summed=True)
