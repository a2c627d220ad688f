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
    # Of a parameter and its leaf: the rows of this rank's gradient for which it holds the optimizer's state, `None` for
    # all. Raises where this part is not a range of rows.
    rows: Callable[[Tensor, Tensor], slice | None] = lambda _, __: None
    shards: int = 1  # number of ranks over which the optimizer's state is sharded
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext  # for all backwards but the last of a step
    ddp: DistributedDataParallel | None = None  # the module, if DDP is the engine
    measured: float = 1.0  # share of the trained parameters, by their number of entries, whose noise is measured
    steps: Steps = field(default_factory=Steps)  # where a step begins and ends
    loss_scale: Callable[[], Tensor | None] | None = None  # the factor on the loss, where the engine has its own


def engine_of(
    model: nn.Module, parameters: Sequence[Tensor], process_group: dist.ProcessGroup | None, *, pipelines: int = 1
) -> Engine:
    """The engine that `model` is wrapped in: one stage of `pipelines`, on as many times fewer ranks than the world.

    Raises:
        UnsupportedError: FSDP1, tensor parallelism under DDP, experts alone, or parameters on meshes that do not fit.
        UsageError: several ranks, but nothing that averages their gradients.
    """
    ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    if ddp is None and any(hasattr(p, "device_mesh") for p in parameters):
        from anybatch._gradients.fsdp import rows_of, sharding_of, synchronised

        sharding = sharding_of(model, parameters, process_group, pipelines=pipelines)
        arrived = synchronised(model)
        return Engine(
            sharding.ranks,
            place=lambda new: sharding.place(model, new),
            reduced=None if sharding.ranks.group is None else arrived,
            arrived=arrived,
            rows=rows_of,
            shards=sharding.shards,
            measured=sharding.measured,
        )
    if dist.is_available() and dist.is_initialized():
        from anybatch._gradients.fsdp import refuse_fsdp1

        refuse_fsdp1(model)
    ranks = replicated_ranks(ddp, process_group)
    if ddp is None or ranks.group is None:
        return Engine(ranks, place=lambda new: list(map(Placement, new)), reduced=None)
    measured = 1.0
    if experts := _experts_under(ddp, parameters):
        from anybatch._gradients.experts import check_experts

        members = set(dist.get_process_group_ranks(ranks.group))
        measured = check_experts(experts, parameters, ranks=members, homes={})
    return Engine(
        ranks,
        place=lambda new: _place_under(ddp, new, copies=ranks.size),
        measured=measured,
        reduced=lambda: bool(ddp.require_backward_grad_sync),
        check=lambda joined: _check_ddp(ddp, joined=joined),
        no_sync=ddp.no_sync,
        ddp=ddp,
    )


def _place_under(ddp: DistributedDataParallel, parameters: Sequence[Tensor], *, copies: int) -> list[Placement]:
    """DDP's own parameters are measured, and experts are not."""
    experts = set(map(id, _experts_under(ddp, parameters)))
    return [Placement.unmeasured(p) if id(p) in experts else Placement(p, mean_copies=copies) for p in parameters]


def _experts_under(ddp: DistributedDataParallel, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    if not any(hasattr(p, "device_mesh") or hasattr(p, "_st_info") for p in parameters):
        return ()
    from anybatch._gradients.experts import experts_under

    return experts_under(ddp, parameters)


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
