"""Experts on a mesh of their own: trained parameters whose gradients have no part of the norms.

Under expert parallelism every rank holds some experts of a layer, and the tokens of all ranks come to them. The
gradient of an expert in one backward therefore sums over the tokens of many ranks: it is the gradient of another
micro-batch than that of the dense parameters. The noise is measured on the dense parameters, and the step scales all.

Dense parameters are sharded by FSDP2 over the data-parallel mesh, or averaged by DDP. Experts are DTensors on another
mesh, which covers all ranks of the data-parallel one and has a part of the experts on each.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import UnsupportedError


def homes_of(model: nn.Module) -> dict[int, DeviceMesh]:
    """By the identity of a parameter, the mesh over which FSDP2 shards it, replicas included."""
    found: dict[int, DeviceMesh] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in groups_of(module._get_fsdp_state()):
                for each in group.fsdp_params:
                    info = each._module_info
                    for tensor in (each.sharded_param, getattr(info.module, info.param_name)):
                        found[id(tensor)] = group.mesh_info.mesh
    return found


def groups_of(state: Any) -> Iterable[Any]:
    """The groups of parameters of one module of FSDP2: several, or at most one, by torch's version."""
    if hasattr(state, "_fsdp_param_groups"):
        return cast("Iterable[Any]", state._fsdp_param_groups)
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def check_experts(
    experts: Sequence[Tensor], parameters: Sequence[Tensor], *, ranks: set[int], homes: Mapping[int, DeviceMesh]
) -> float:
    """The share of `parameters`, by their number of entries, that are no `experts`.

    Args:
        experts: Those outside of the data-parallel mesh.
        parameters: All trained parameters.
        ranks: The ranks of the data-parallel mesh.
        homes: As by `homes_of`.

    Raises:
        UnsupportedError: all parameters are experts, or nothing averages one of them over all ranks.
    """
    for p in experts:
        held = set(p.device_mesh.mesh.flatten().tolist()) if isinstance(p, DTensor) else set[int]()
        first = homes[id(p)].ndim if id(p) in homes else 0  # the dimensions after those of FSDP2
        if not isinstance(p, DTensor) or not ranks <= held or all(e.is_replicate() for e in p.placements[first:]):
            raise UnsupportedError(
                f"Nothing averages a trained parameter of shape {list(p.shape)} over the data-parallel ranks "
                f"{sorted(ranks)}: it lies on the ranks {sorted(held)}. Shard it by FSDP2 over all of them. An expert "
                "must be a DTensor with a part of it, by Shard, on each rank of its mesh: use fully_shard over the "
                "ranks that hold the same expert."
            )
    whole = sum(p.numel() for p in parameters)
    dense = whole - sum(p.numel() for p in experts)
    if dense == 0:
        raise UnsupportedError(
            f"All {len(parameters)} trained parameters are experts. Their gradients in one backward sum over the "
            "tokens of several ranks, so none of them shows the noise of one micro-batch. Train a dense parameter as "
            "well, such as the router, or train without a measurement: rule=anybatch.SquareRoot()."
        )
    return dense / whole


def experts_under(ddp: DistributedDataParallel, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The DTensors among `parameters` that DDP ignores.

    Raises:
        UnsupportedError: DDP averages a DTensor, or what was one.
    """
    ignored = {id(p) for name, p in ddp.module.named_parameters() if name in ddp.parameters_to_ignore}
    for p in parameters:
        if id(p) not in ignored and (isinstance(p, DTensor) or hasattr(p, "_st_info")):
            raise UnsupportedError(
                f"A trained parameter of shape {list(p.shape)} under DistributedDataParallel is a DTensor. Torch takes "
                "those out of the module in its first forward, so that state_dict() no longer has them and they cannot "
                "be saved or averaged. Use torch.distributed.fsdp.fully_shard for the data-parallel dimension: over a "
                "mesh of (ranks, 1) it replicates, as DDP does."
            )
    return [p for p in parameters if isinstance(p, DTensor)]
