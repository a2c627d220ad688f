"""FSDP2: the tensors that get the gradients of a sharded parameter, and the ranks of its shards."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from anybatch._errors import UnsupportedError, UsageError
from anybatch._gradients.reduce import Ranks


def unsharded_leaves(model: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
    """For each of the sharded `parameters`, the unsharded one that FSDP2 puts in its place for a forward.

    FSDP2 keeps these tensors and only frees and fills their storage, so hooks on them stay. This gathers one module at
    a time: a collective.

    Raises:
        UnsupportedError: a parameter is a DTensor that FSDP2 does not gather whole: tensor parallelism.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        sharded = dict(module.named_parameters())
        module.unshard()
        leaf: Tensor
        for name, leaf in module.named_parameters():
            if leaf is not sharded[name]:
                found[id(sharded[name])] = leaf
        module.reshard()
    leaves = [found.get(id(p), p) for p in parameters]
    for leaf in leaves:
        if isinstance(leaf, DTensor):
            raise UnsupportedError(
                "A trained parameter is a DTensor outside of FSDP2 (tensor parallelism): its gradient is spread over "
                "ranks with the same examples, and anybatch adds up norms over ranks with different examples. Shard "
                "over the data alone, by FSDP2 (fully_shard) on all ranks."
            )
    return leaves


def synchronised(model: nn.Module) -> Callable[[], bool]:
    """A function that returns whether a backward that ends now has reduced its gradients into the shards' `.grad`.

    FSDP2 keeps the gradients of unsynchronised backwards with the unsharded parameters until a reduction.
    """
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]

    return lambda: all(group.reduce_grads and group.all_reduce_grads for state in states for group in _groups_of(state))


def _groups_of(state: Any) -> Iterable[Any]:
    """The groups of parameters of one module: several, or at most one, by torch's version."""
    if hasattr(state, "_fsdp_param_groups"):
        return cast("Iterable[Any]", state._fsdp_param_groups)
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def sharded_ranks(parameters: Sequence[Tensor], given: dist.ProcessGroup | None) -> tuple[Ranks, int]:
    """The ranks over which FSDP2 averages the gradients of `parameters`, and the number that hold the same shard.

    Raises:
        UnsupportedError: the parameters lie on different meshes, or some are not sharded at all.
        UsageError: a mesh of two dimensions (HSDP) that is not the whole world, without `process_group`.
    """
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    layouts = {(p.device_mesh, tuple(placement.is_replicate() for placement in p.placements)) for p in sharded}
    if len(sharded) != len(parameters) or len(layouts) != 1:
        raise UnsupportedError(
            "Under FSDP2 all trained parameters must be sharded over one mesh, and these are not: call fully_shard on "
            "the whole model with one mesh."
        )
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    replicas = 1
    for size, placement in zip(mesh.shape, placements, strict=True):
        replicas *= size if placement.is_replicate() else 1
    if mesh.size() == 1:
        return Ranks(), 1
    if given is None and mesh.ndim > 1:
        if mesh.size() != dist.get_world_size():
            raise UsageError(
                f"The mesh of the parameters has {tuple(mesh.shape)} ranks, which is not the whole world: pass attach "
                "the process_group of all these ranks."
            )
        given = dist.group.WORLD
    group = given if given is not None else mesh.get_group()
    return Ranks(group, mesh.size(), replicated=False), replicas


def rows_of(parameter: Tensor) -> slice | None:
    """The rows of the unsharded `parameter` that this rank's shard holds; `None` for all.

    Raises:
        UnsupportedError: its shards are not along the first dimension.
    """
    if not isinstance(parameter, DTensor):
        return None
    mesh, first, rows = parameter.device_mesh, 0, None
    for dim, (size, placement) in enumerate(zip(mesh.shape, parameter.placements, strict=True)):
        if placement.is_replicate() or size == 1:
            continue
        if rows is not None or not placement.is_shard(dim=0):
            raise UnsupportedError(
                "A trained parameter is not sharded along its first dimension, as AdaScale(metric='adam') needs: use "
                "metric='euclidean', or fully_shard without shard_placement_fn."
            )
        first = mesh.get_local_rank(dim) * -(-parameter.shape[0] // size)  # as torch.chunk: all but the last are equal
        rows = slice(first, first + parameter.to_local().shape[0])
    return rows


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise under FSDP1, which flattens the parameters of many layers into one and has been superseded."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedError(
            "FullyShardedDataParallel (FSDP1) is not supported: use torch.distributed.fsdp.fully_shard (FSDP2)."
        )
