"""FSDP2 and tensor parallelism: where the gradients of a parameter arrive, and which ranks hold the same part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from anybatch._errors import UnsupportedError, UsageError
from anybatch._gradients.experts import check_experts, groups_of, homes_of
from anybatch._gradients.norms import local_of
from anybatch._gradients.probe import Placement
from anybatch._gradients.reduce import Ranks


@dataclass(frozen=True)
class Sharding:
    """How the ranks share a model.

    Args:
        ranks: the ranks.
        shards: number of ranks over which FSDP2 shards the optimizer's state.
        data: the mesh of the data-parallel ranks; `None` without FSDP2.
        measured: the share of the parameters that are on it.
    """

    ranks: Ranks
    shards: int
    data: DeviceMesh | None = None
    measured: float = 1.0

    def place(self, model: nn.Module, parameters: Sequence[Tensor]) -> list[Placement]:
        """Where the gradients of `parameters` are measured; every rank must call this together."""
        each = self.ranks.model
        whole = self.ranks.size * each
        homes = homes_of(model)
        return [
            Placement(leaf, each // _shards(leaf), whole // _shards(p))
            if self.data is None or homes.get(id(p)) == self.data
            else Placement.unmeasured(leaf)
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

    return lambda: all(group.reduce_grads and group.all_reduce_grads for state in states for group in groups_of(state))


def sharding_of(
    model: nn.Module, parameters: Sequence[Tensor], given: dist.ProcessGroup | None, *, pipelines: int = 1
) -> Sharding:
    """The ranks that share `model`, one stage of `pipelines`, by FSDP2 and tensor parallelism.

    Raises:
        UnsupportedError: dense modules are sharded over different meshes, or parameters lie on meshes that do not fit.
        UsageError: the ranks are not the whole world, and no `process_group` was given.
    """
    homes = homes_of(model)
    data = max(homes.values(), key=lambda mesh: mesh.size(), default=None)
    if data is not None and any(mesh != data and mesh.size() == data.size() for mesh in homes.values()):
        raise UnsupportedError(
            f"FSDP2 shards the modules over different meshes of {data.size()} ranks, and anybatch adds up norms over "
            "one: shard all of them over the same mesh. Experts are sharded over a smaller one."
        )
    width = 1 if data is None else data.size()
    if data is not None and any(not isinstance(p, DTensor) for p in parameters):
        raise UnsupportedError("Under FSDP2 all trained parameters must be sharded: some of these are not.")
    measured, dense = 1.0, [p for p in parameters if isinstance(p, DTensor)]
    if data is not None:
        experts = [p for p in dense if homes.get(id(p)) != data]
        measured = check_experts(experts, dense, ranks=set(data.mesh.flatten().tolist()), homes=homes)
        dense = [p for p in dense if homes.get(id(p)) == data]
    sizes = {p.device_mesh.size() for p in dense}
    whole = max(sizes)
    if sizes - {width if data is not None else whole, whole}:
        raise UnsupportedError(f"The trained parameters lie on meshes of {sorted(sizes)} ranks: use one mesh for all.")
    if whole == 1:
        return Sharding(Ranks(), 1)
    mesh = next(p.device_mesh for p in dense if p.device_mesh.size() == whole)
    if given is None and (mesh.ndim > 1 or data is None):
        if whole * pipelines != dist.get_world_size():
            raise UsageError(
                f"The mesh of the parameters has {tuple(mesh.shape)} ranks, and the world {dist.get_world_size()}. If "
                "the others train the same model, use fully_shard over the data-parallel dimension. If each mesh "
                "trains its own model, pass attach the process_group of all its ranks."
            )
        given = dist.group.WORLD
    group = given if given is not None else mesh.get_group()
    if dist.get_world_size(group) not in (whole, whole * pipelines):
        raise UsageError(
            f"The process_group has {dist.get_world_size(group)} ranks, and the parameters lie on {whole}: give attach "
            "the process_group of all ranks that hold a part of the model."
        )
    ranks = Ranks(group, width, replicated=False, model=whole // width)
    shards = prod(_split(dense[0], 0 if data is None else data.ndim))
    return Sharding(ranks, shards, data, measured)


def _split(tensor: DTensor, dimensions: int) -> list[int]:
    """The sizes of the mesh's first `dimensions` over which a tensor is split."""
    pairs = zip(tensor.device_mesh.shape[:dimensions], tensor.placements, strict=False)
    return [1 if placement.is_replicate() else size for size, placement in pairs]


def rows_of(parameter: Tensor, leaf: Tensor) -> slice | None:
    """The rows of this rank's part of the unsharded `leaf` that its shard, `parameter`, holds; `None` for all.

    Raises:
        UnsupportedError: its shards are not along the first dimension.
    """
    if leaf is parameter or not isinstance(parameter, DTensor):
        return None
    mesh, rows = parameter.device_mesh, None
    for dim in range(mesh.ndim - (leaf.device_mesh.ndim if isinstance(leaf, DTensor) else 0)):
        size, placement = mesh.shape[dim], parameter.placements[dim]
        if placement.is_replicate() or size == 1:
            continue
        if rows is not None or getattr(placement, "dim", None) != 0:
            raise UnsupportedError(
                "A trained parameter is not sharded along its first dimension, as AdaScale(metric='adam') needs: use "
                "metric='euclidean', or fully_shard without shard_placement_fn."
            )
        length = local_of(leaf).shape[0]
        first = mesh.get_local_rank(dim) * -(-length // size)  # as torch.chunk: all but the last are equal
        rows = slice(first, first + parameter.to_local().shape[0])
    return rows


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise under FSDP1, which flattens the parameters of many layers into one and has been superseded."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedError(
            "FullyShardedDataParallel (FSDP1) is not supported: use torch.distributed.fsdp.fully_shard (FSDP2), or "
            "constant values from a record (docs/where-not.md)."
        )
