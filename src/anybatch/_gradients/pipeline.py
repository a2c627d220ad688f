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
from anybatch._gradients.autograd import at_end
from anybatch._gradients.engine import Engine, engine_of
from anybatch._gradients.hooks import GradientHooks
from anybatch._gradients.norms import part_of
from anybatch._gradients.probe import Placement
from anybatch._gradients.reduce import Ranks
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


def pipeline_engine(schedule: Any, parameters: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> Engine:
    """The engine of a rank's stages: plain modules, or each under DDP, FSDP2 or tensor parallelism.

    Args:
        schedule: The schedule of this rank.
        parameters: Those that are trained on this rank.
        process_group: All ranks of the training; the default group if `None`.

    Raises:
        UsageError: there are more ranks than stages, data-parallel and tensor-parallel ranks account for.
    """
    group = process_group if process_group is not None else dist.group.WORLD
    stages = _stages(schedule)
    across = dist.get_world_size(stages[0].group)  # ranks of one pipeline
    world = dist.get_world_size(group)
    model = stages_of(schedule)
    averaged = any(isinstance(m, DistributedDataParallel) for m in model.modules())
    if not averaged and not any(hasattr(p, "device_mesh") for p in parameters):
        inner = Engine(Ranks(), place=lambda new: list(map(Placement, new)), reduced=None)
    else:
        inner = engine_of(model, parameters, None, pipelines=across)
    if inner.ranks.size * inner.ranks.model * across != world:
        raise UsageError(
            f"{world} ranks train this pipeline of {across} ranks, and its stages are averaged over "
            f"{inner.ranks.size * inner.ranks.model} of them. Wrap each stage's module in DistributedDataParallel or "
            "fully_shard over the ranks that hold the same stage, or pass attach the process_group of one pipeline."
        )
    mine, numbers = sum(p.numel() for p in parameters), [0] * world
    dist.all_gather_object(numbers, mine, group=group)
    ranks = Ranks(
        group,
        inner.ranks.size,
        replicated=False,
        model=inner.ranks.model * across,
        elsewhere=sum(numbers) * across // world - mine,
    )
    return replace(inner, ranks=ranks, reduced=lambda: True, arrived=lambda: True, rows=_no_rows, ddp=None)


def _no_rows(_: Tensor) -> slice | None:
    raise UnsupportedError("AdaScale(metric='adam') works without a pipeline: use metric='euclidean'.")


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
            if hooks is None or not hooks._running or grad.is_meta:  # torch infers shapes with meta tensors
                return
            leaf = hooks._leaves[index]()
            hooks._fires[index] += 1
            if hooks._norms.taken and leaf is not None:
                hooks._norms.sample(hooks._fires[index] - 1, index, part_of(grad, leaf))
                task = current_task()
                if task != hooks._task:  # later gradients may be added to this tensor
                    hooks._task = task
                    at_end(hooks._norms.euclidean.measure)

        return hook

    def _begin(self) -> None:
        """Begin a call of the schedule."""
        if self._fingerprint.cleared(self.pending) and (self.pending == 0 or self._cleared()):
            self._open()
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
