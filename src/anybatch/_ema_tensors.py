"""What of a model is averaged: its tensors by name, as they are now, and as this rank holds them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import InvalidValueError, StateError, UsageError

Slot = tuple[dict[str, Any], str]

# Running statistics of torch's norm layers, and of others that follow their names.
_STATISTICS = ("running_mean", "running_var")
# What torch.compile and activation checkpointing put into names: an average belongs to the model, not to a wrapper.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class Tensors:
    """The averaged tensors of a model.

    A parameter is found anew where it is registered, so that one that was replaced is followed; `.data` that was
    swapped is seen by its address. Under FSDP2 the shards are held, for their places hold whole parameters for a while.

    Args:
        model: the module; names are those below a DistributedDataParallel, and without torch.compile's prefix.
        include: which floating parameters and statistics, by name.
        statistics: whether running_mean and running_var are averaged, too.

    Raises:
        InvalidValueError: nothing to average, or a tensor without storage.
    """

    def __init__(self, model: nn.Module, include: Callable[[str], bool], *, statistics: bool) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.reshard()
        self._slots: dict[str, Slot] = {}
        self._shards: dict[str, Any] = {}
        seen: set[int] = set()
        for name, (places, key) in _places(self.model, statistics=statistics):
            tensor = places[key]
            if id(tensor) in seen or not tensor.is_floating_point() or not include(name):
                continue
            seen.add(id(tensor))
            if tensor.is_meta:
                raise InvalidValueError(f"{name} is on the meta device: give the model its weights before ModelEMA.")
            self._slots[name] = places, key
            if is_sharded(tensor):
                self._shards[name] = tensor
        if not self._slots:
            raise InvalidValueError("The model has no floating parameter of the names to include: nothing to average.")
        self.names = list(self._slots)

    def local(self) -> list[Tensor]:
        """The tensors that this rank holds.

        Raises:
            UsageError: one is no more where it was registered.
        """
        if self._shards:
            return [self._shard(name)._local_tensor if name in self._shards else self[name] for name in self.names]
        found: list[Any] = [places.get(key) for places, key in self._slots.values()]
        if any(tensor is None for tensor in found):
            return [self[name] for name in self.names]  # which raises, with the name
        return found

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of this name; under FSDP2 the DTensor."""
        if name in self._shards:
            return self._shard(name)  # type: ignore[no-any-return]
        places, key = self._slots[name]
        tensor: Tensor | None = places.get(key)
        if tensor is None:
            raise UsageError(
                f"{name} is no more where ModelEMA found it: make ModelEMA after parametrizing, replacing layers or "
                "sharding the model."
            )
        return tensor

    @contextmanager
    def kept(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Copies of the averaged tensors and of every buffer, beside them; in the end they are put back."""
        self.reshard()
        places = [(m._buffers, key, b) for m in self.model.modules() for key, b in m._buffers.items()]
        buffers: list[tuple[Any, str, Tensor]] = [(owner, key, b) for owner, key, b in places if b is not None]
        tensors = {id(t): t.detach() for t in (*self.local(), *(buffer for _, _, buffer in buffers))}
        copies = [(tensor, tensor.clone()) for tensor in tensors.values()]
        try:
            yield copies
        finally:
            self.reshard()
            for owner, key, buffer in buffers:
                owner[key] = buffer  # a forward may have put another one there
            for tensor, copy in copies:
                tensor.copy_(copy)

    def reshard(self) -> None:
        """Free FSDP2's gathered parameters: after a forward alone they stay, and hide what is written to shards."""
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
        for module in self.model.modules() if fsdp else ():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()

    def as_saved(self, name: str, local: Tensor) -> Tensor:
        """`local`, of this rank, as a part of the whole: a DTensor, if the parameter is one; no communication."""
        if name not in self._shards:
            return local
        from torch.distributed.tensor import DTensor

        whole: Any = self[name]
        mesh, placements = whole.device_mesh, whole.placements
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())

    def as_held(self, name: str, saved: Tensor) -> Tensor:
        """What this rank holds of a saved tensor.

        Raises:
            StateError: another shape, or sharded in another way.
        """
        whole: Any = self[name]
        if saved.shape != whole.shape:
            shapes = f"{list(saved.shape)} for {list(whole.shape)}"
            raise StateError(f"The state is of another model: {name} has shape {shapes}.")
        theirs: Any = saved
        if is_sharded(saved):
            alike = name in self._shards and theirs.placements == whole.placements
            if not alike or theirs.device_mesh != whole.device_mesh:
                raise StateError(
                    f"The state's {name} is sharded otherwise: load it through torch.distributed.checkpoint, with "
                    "this object's state_dict() to be filled."
                )
            return theirs._local_tensor  # type: ignore[no-any-return]
        if name not in self._shards:
            return saved
        from torch.distributed.tensor import distribute_tensor

        part = distribute_tensor(saved.to(whole.device), whole.device_mesh, whole.placements, src_data_rank=None)
        return part._local_tensor

    def _shard(self, name: str) -> Any:
        places, key = self._slots[name]
        registered = places.get(key)
        if registered is not self._shards[name] and registered is not None and is_sharded(registered):
            self._shards[name] = registered  # load_state_dict(assign=True)
        return self._shards[name]


def clean(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _places(model: nn.Module, *, statistics: bool) -> Iterator[tuple[str, Slot]]:
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield clean(dot + key), (module._parameters, key)
        for key in _STATISTICS if statistics else ():
            if module._buffers.get(key) is not None:
                yield clean(dot + key), (module._buffers, key)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, asked without importing them."""
    return hasattr(tensor, "_local_tensor")
