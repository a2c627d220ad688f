"""The engine that averages the gradients: one process, DDP or FSDP2. Only `engine_of` distinguishes them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import UnsupportedError, UsageError
from anybatch._gradients.probe import Placement
from anybatch._gradients.reduce import Ranks, replicated_ranks
from anybatch._gradients.steps import Steps


@dataclass(frozen=True)
class Engine:
    """The properties of an engine that a controller depends on."""

    ranks: Ranks  # over which gradients are averaged
    place: Callable[[Sequence[Tensor]], list[Placement]]  # where the gradients of trained parameters are measured
    reduced: Callable[[], bool] | None  # at the end of a backward: whether `.grad` is the average; `None` on one rank
    # Raises before a step that cannot be measured; its argument: whether the controller takes part in a `Join`.
    check: Callable[[bool], None] = lambda _: None
    arrived: Callable[[], bool] = lambda: True  # at the end of a backward: whether its gradients are in `.grad`
    # The rows of a parameter's gradient for which this rank holds the optimizer's state; `None` for all. Raises where
    # this part is not a range of rows.
    rows: Callable[[Tensor], slice | None] = lambda _: None
    shards: int = 1  # number of ranks over which the optimizer's state is sharded
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext  # for all backwards but the last of a step
    ddp: DistributedDataParallel | None = None  # the module, if DDP is the engine
    steps: Steps = field(default_factory=Steps)  # where a step begins and ends
    loss_scale: Callable[[], Tensor | None] | None = None  # the factor on the loss, where the engine has its own


def engine_of(
    model: nn.Module, parameters: Sequence[Tensor], process_group: dist.ProcessGroup | None, *, pipelines: int = 1
) -> Engine:
    """The engine that `model` is wrapped in: one stage of `pipelines`, on as many times fewer ranks than the world.

    Raises:
        UnsupportedError: FSDP1, or parameters on meshes that do not fit.
        UsageError: several ranks, but nothing that averages their gradients.
    """
    if any(hasattr(p, "device_mesh") for p in parameters):
        from anybatch._gradients.fsdp import rows_of, sharding_of, synchronised

        sharding = sharding_of(model, parameters, process_group, pipelines=pipelines)
        arrived = synchronised(model)
        return Engine(
            sharding.ranks,
            place=lambda new: sharding.place(model, new),
            reduced=None if sharding.ranks.group is None else arrived,
            arrived=arrived,
            rows=_no_rows if sharding.ranks.model > 1 else rows_of,
            shards=sharding.shards,
        )
    if dist.is_available() and dist.is_initialized():
        from anybatch._gradients.fsdp import refuse_fsdp1

        refuse_fsdp1(model)
    ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    ranks = replicated_ranks(ddp, process_group)
    if ddp is None or ranks.group is None:
        return Engine(ranks, place=lambda new: list(map(Placement, new)), reduced=None)
    return Engine(
        ranks,
        place=lambda new: [Placement(p, mean_copies=ranks.size) for p in new],
        reduced=lambda: bool(ddp.require_backward_grad_sync),
        check=lambda joined: _check_ddp(ddp, joined=joined),
        no_sync=ddp.no_sync,
        ddp=ddp,
    )


def _no_rows(_: Tensor) -> slice | None:
    raise UnsupportedError(
        "AdaScale(metric='adam') works without tensor parallelism: there Adam's second moments are split over ranks in "
        "two ways. Use metric='euclidean'."
    )


def _check_ddp(ddp: DistributedDataParallel, *, joined: bool) -> None:
    if ddp._join_config.enable and not joined:
        raise UsageError(
            "Inside of model.join() a rank without further data does not take part in the reduction of the norms. Join "
            "both: with torch.distributed.algorithms.Join([model, controller]): ..."
        )
    for _, state in ddp._comm_hooks:
        if type(state).__name__ == "PowerSGDState":
            raise UnsupportedError(
                "PowerSGD is not supported: the norm of the decompressed gradient is not that of the mean gradient. "
                "Use the fp16 or bf16 compression hook, or none; or constant values from a record (docs/where-not.md)."
            )
