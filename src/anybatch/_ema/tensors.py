"""The averaged tensors of a model by name, as this rank stores them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from anybatch._errors import InvalidValueError, StateError, UnsupportedError, UsageError
from anybatch._numbers import shown

Slot = tuple[dict[str, Any], str]

# Running statistics of torch's norm layers and of layers with the same names.
_STATISTICS = ("running_mean", "running_var")
# Prefixes that torch.compile and activation checkpointing add to names. An average has the names of the bare model.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Snapshot:
    """Copies of the averaged tensors, and of each buffer its slot, its tensor and a copy."""

    values: list[Tensor]
    buffers: list[tuple[dict[str, Any], str, Tensor, Tensor]]


class Tensors:
    """The averaged tensors of a model.

    A parameter is read from the module at each use, so a replaced one is followed. Under FSDP2 the shards are stored
    here, because the module holds gathered parameters during a forward.

    Args:
        model: The module. Names are those inside of a DistributedDataParallel, without torch.compile's prefix.
        include: Selects floating or complex parameters and statistics by name.
        statistics: Whether running_mean and running_var are averaged too.
    """

    def __init__(self, model: nn.Module, include: Callable[[str], bool], *, statistics: bool) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.include, self._statistics = include, statistics
        self.reshard()
        self._slots = self._averaged()
        if not self._slots:
            raise InvalidValueError(
                "There is nothing to average: include must select a floating parameter of the model."
            )
        self.names = list(self._slots)
        self._shards: dict[str, Any] = {}
        for name, (owner, key) in self._slots.items():
            tensor = owner[key]
            if is_lazy(tensor):
                raise InvalidValueError(f"{name} is lazy and has no shape: run a forward before ModelEMA(...).")
            if hasattr(tensor, "ds_numel"):
                raise UnsupportedError(
                    "ModelEMA does not support ZeRO stage 3, whose parameters are empty between forwards: use stage 2, "
                    "or FSDP2."
                )
            if tensor.is_meta:
                raise InvalidValueError(f"{name} is on the meta device: load the weights before ModelEMA(...).")
            if is_sharded(tensor):
                self._shards[name] = tensor

    @property
    def sharded(self) -> bool:
        """Whether some are shards of FSDP2."""
        return bool(self._shards)

    def check(self) -> None:
        """Raise UsageError if a layer was replaced, parametrized or added, or weights were tied or untied."""
        known, now = ({n: (id(owner), k) for n, (owner, k) in s.items()} for s in (self._slots, self._averaged()))
        changed = [name for name in known | now if known.get(name) != now.get(name)]
        if changed:
            raise UsageError(
                f"{changed[:5]} were added, removed or moved to another module after ModelEMA was made: make it after "
                "parametrizing, replacing or adding layers."
            )

    def local(self) -> list[Tensor]:
        """Return the tensors of this rank, or raise UsageError if the model has lost one."""
        found = self._found()
        for name, tensor in zip(self.names, found, strict=True):
            if tensor is None:
                raise UsageError(
                    f"{name} is no longer in the module where ModelEMA found it: make ModelEMA after parametrizing, "
                    "replacing layers or sharding the model."
                )
        return found

    @contextmanager
    def kept(self) -> Iterator[Snapshot]:
        """Copy the averaged tensors and all buffers for the time of a `with`, and restore them after it."""
        self.reshard()
        buffers = [(m._buffers, key, b) for m in self.model.modules() for key, b in m._buffers.items() if b is not None]
        values = [tensor.detach().clone() for tensor in self.local()]
        snapshot = Snapshot(values, [(owner, key, b, _stored(b).clone()) for owner, key, b in buffers])
        try:
            yield snapshot
        finally:
            self.restore(snapshot)

    def restore(self, snapshot: Snapshot) -> None:
        """Copy values and buffers into the current tensors of the model.

        Raises:
            UsageError: A tensor is missing or has another shape; all others are restored.
        """
        self.reshard()
        lost, moved = [], False
        with torch.inference_mode():  # it may write to tensors made in either mode
            for name, tensor, value in zip(self.names, self._found(), snapshot.values, strict=True):
                if tensor is None or tensor.shape != value.shape:
                    lost.append(name)
                    continue
                tensor.detach().copy_(value)
                moved = moved or (tensor.dtype, tensor.device) != (value.dtype, value.device)
            for owner, key, buffer, value in snapshot.buffers:
                now = owner.get(key)  # a forward may replace it, or `model.to` for good
                owner[key] = now if moved and now is not None and now.shape == buffer.shape else buffer
                _stored(owner[key]).copy_(value)
        if lost:
            raise UsageError(f"{lost[:5]} changed inside of applied(): the model's own weights do not fit any more.")

    def reshard(self) -> None:
        """Free FSDP2's gathered parameters, which remain after a forward alone and hide writes to the shards."""
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
        for module in self.model.modules() if fsdp else ():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()

    def as_saved(self, name: str, local: Tensor) -> Tensor:
        """Return `local` of this rank as a DTensor if the parameter is one, without communication."""
        if name not in self._shards:
            return local
        from torch.distributed.tensor import DTensor

        whole = self._whole(name)
        mesh, placements = whole.device_mesh, whole.placements
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())

    def as_held(self, name: str, saved: Any) -> Tensor:
        """Return this rank's part of a saved tensor, or raise StateError if it does not fit."""
        whole = self._whole(name)
        if not isinstance(saved, Tensor):
            raise StateError(f"The state is damaged: {name} must be a tensor, got {shown(saved)}.")
        if saved.is_meta or saved.layout is not torch.strided:
            raise StateError(f"The state's {name} has no dense values to copy: {saved.device}, {saved.layout}.")
        if saved.is_complex() != whole.is_complex() or not (saved.is_complex() or saved.is_floating_point()):
            raise StateError(f"The state is of another model: {name} has {saved.dtype}, not {whole.dtype}.")
        if saved.shape != whole.shape:
            shapes = f"{list(saved.shape)}, not {list(whole.shape)}"
            raise StateError(f"The state is of another model: {name} has the shape {shapes}.")
        if is_sharded(saved):
            shard: Any = saved
            alike = name in self._shards and shard.placements == whole.placements
            if not alike or shard.device_mesh != whole.device_mesh:
                raise StateError(
                    f"The state's {name} has another sharding: load it by torch.distributed.checkpoint into this "
                    "object's state_dict()."
                )
            return shard._local_tensor  # type: ignore[no-any-return]
        if name not in self._shards:
            return saved
        from torch.distributed.tensor import distribute_tensor

        part = distribute_tensor(saved.to(whole.device), whole.device_mesh, whole.placements, src_data_rank=None)
        return part._local_tensor

    def _averaged(self) -> dict[str, Slot]:
        found: dict[str, Slot] = {}
        seen: set[int] = set()
        for prefix, module in self.model.named_modules():
            slots: list[Slot] = [(module._parameters, key) for key in module._parameters]
            slots += [(module._buffers, key) for key in _STATISTICS if self._statistics]
            for owner, key in slots:
                tensor, name = owner.get(key), clean(f"{prefix}.{key}" if prefix else key)
                if tensor is None or id(tensor) in seen:
                    continue
                if (tensor.is_floating_point() or tensor.is_complex()) and self.include(name):
                    seen.add(id(tensor))
                    found[name] = owner, key
        return found

    def _found(self) -> list[Any]:
        if not self._shards:
            return [owner.get(key) for owner, key in self._slots.values()]
        slots = self._slots.items()
        return [self._shard(n)._local_tensor if n in self._shards else owner.get(k) for n, (owner, k) in slots]

    def _whole(self, name: str) -> Any:
        """Return the tensor of this name; under FSDP2 the DTensor."""
        owner, key = self._slots[name]
        return self._shard(name) if name in self._shards else owner[key]

    def _shard(self, name: str) -> Any:
        owner, key = self._slots[name]
        registered = owner.get(key)
        if registered is not self._shards[name] and registered is not None and is_sharded(registered):
            self._shards[name] = registered  # load_state_dict(assign=True)
        return self._shards[name]


def clean(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _stored(tensor: Tensor) -> Tensor:
    """Return the tensor without the repetitions of `expand`, which cannot be written to."""
    for dim, stride in enumerate(tensor.stride() if tensor.layout is torch.strided else ()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor, without importing DTensor."""
    return hasattr(tensor, "_local_tensor")
