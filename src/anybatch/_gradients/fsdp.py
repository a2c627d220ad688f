"""FSDP2 and tensor parallelism: where the gradients of a parameter arrive, and which ranks hold the same part."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from anybatch._errors import UnsupportedError, UsageError
from anybatch._gradients.probe import Placement
from anybatch._gradients.reduce import Ranks


@dataclass(frozen=True)
class Sharding:
    """How the ranks share a model.

    Args:
        ranks: the ranks.
        shards: number of ranks over which FSDP2 shards the optimizer's state.
    """

    ranks: Ranks
    shards: int

    def place(self, model: nn.Module, parameters: Sequence[Tensor]) -> list[Placement]:
        """Where the gradients of `parameters` are measured; every rank must call this together."""
        each = self.ranks.model
        whole = self.ranks.size * each
        return [
            Placement(leaf, each // _shards(leaf), whole // _shards(p))
            for p, leaf in zip(parameters, unsharded_leaves(model, parameters), strict=True)
        ]


def _shards(tensor: Tensor) -> int:
    """Number of different parts of a tensor on its mesh."""
    found = 1
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            found *= 1 if placement.is_replicate() else size
    return found


def unsharded_leaves(model: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
    """For each of the sharded `parameters`, the unsharded one that FSDP2 puts in its place for a forward.

    FSDP2 keeps these tensors and only frees and fills their storage, so hooks on them stay. This gathers one module at
    a time: a collective.

    Under tensor parallelism that is a DTensor over the ranks that share a micro-batch, or a plain tensor.
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
    return [found.get(id(p), p) for p in parameters]


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


def sharding_of(
    model: nn.Module, parameters: Sequence[Tensor], given: dist.ProcessGroup | None, *, pipelines: int = 1
) -> Sharding:
    """The ranks that share `model`, one stage of `pipelines`, by FSDP2 and tensor parallelism.

    Raises:
        UnsupportedError: modules are sharded over different meshes, or parameters lie on meshes that do not fit.
        UsageError: the ranks are not the whole world, and no `process_group` was given.
    """
    meshes = list(dict.fromkeys(_meshes(model)))
    if len(meshes) > 1:
        raise UnsupportedError(
            f"FSDP2 shards the modules over {len(meshes)} different meshes, and anybatch adds up norms over one: shard "
            "all of them over the same mesh."
        )
    tensors = [p for p in parameters if isinstance(p, DTensor)]
    data = meshes[0].size() if meshes else 1
    largest = max((p.device_mesh.size() for p in tensors), default=1)
    if not meshes and any(p.device_mesh.size() != largest for p in tensors):
        raise UnsupportedError("The trained parameters lie on meshes of different sizes: use one for all of them.")
    whole = max(data, largest)
    if meshes and (whole % data or any(p.device_mesh.size() not in (data, whole) for p in tensors)):
        raise UnsupportedError(
            f"Parameters lie on meshes of {sorted({p.device_mesh.size() for p in tensors})} ranks, of which FSDP2 has "
            f"{data}: shard each of them by FSDP2 and tensor parallelism over one mesh."
        )
    if meshes and len(tensors) != len(parameters):
        raise UnsupportedError("Under FSDP2 all trained parameters must be sharded: some of these are not.")
    if whole == 1:
        return Sharding(Ranks(), 1)
    mesh = next(p.device_mesh for p in tensors if p.device_mesh.size() == whole)
    if given is None and mesh.ndim > 1:
        if whole * pipelines != dist.get_world_size():
            raise UsageError(
                f"The mesh of the parameters has {tuple(mesh.shape)} ranks, which is not the whole world: pass attach "
                "the process_group of all these ranks."
            )
        given = dist.group.WORLD
    group = given if given is not None else mesh.get_group()
    if dist.get_world_size(group) not in (whole, whole * pipelines):
        raise UsageError(
            f"The process_group has {dist.get_world_size(group)} ranks, and the parameters lie on {whole}: give attach "
            "the process_group of all ranks that hold a part of the model."
        )
    ranks = Ranks(group, data, replicated=False, model=whole // data)
    return Sharding(ranks, max((_shards(p) for p in tensors if p.device_mesh.size() == data), default=1))


def _meshes(model: nn.Module) -> Iterable[Any]:
    """The meshes over which FSDP2 shards, replicas included."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _groups_of(module._get_fsdp_state()):
                yield group.mesh_info.mesh


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
            "FullyShardedDataParallel (FSDP1) is not supported: use torch.distributed.fsdp.fully_shard (FSDP2), or "
            "constant values from a record (docs/where-not.md)."
        )
