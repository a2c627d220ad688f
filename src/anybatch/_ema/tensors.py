"""What of a model is averaged: its tensors by name, as they are now, and as this rank holds them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from anybatch._errors import InvalidValueError, StateError, UsageError
from anybatch._numbers import shown

Slot = tuple[dict[str, Any], str]

# Running statistics of torch's norm layers, and of others that follow their names.
_STATISTICS = ("running_mean", "running_var")
# What torch.compile and activation checkpointing put into names: an average belongs to the model, not to a wrapper.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Snapshot:
    """A model at one time.

    Args:
        values: copies of the averaged tensors.
        buffers: for each buffer its place, the tensor that was there, and a copy.
    """

    values: list[Tensor]
    buffers: list[tuple[dict[str, Any], str, Tensor, Tensor]]


class Tensors:
    """The averaged tensors of a model.

    A parameter is found anew where it is registered, so that one that was replaced is followed; `.data` that was
    swapped is seen by its address. Under FSDP2 the shards are held, for their places hold whole parameters for a while.

    Args:
        model: the module; names are those below a DistributedDataParallel, and without torch.compile's prefix.
        include: which floating or complex parameters and statistics, by name.
        statistics: whether running_mean and running_var are averaged, too.

    Raises:
        InvalidValueError: nothing to average, or a tensor without storage.
    """

    def __init__(self, model: nn.Module, include: Callable[[str], bool], *, statistics: bool) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.include, self._statistics = include, statistics
        self.reshard()
        self._slots = self._averaged()
        if not self._slots:
            raise InvalidValueError("The model has no floating parameter of the names to include: nothing to average.")
        self.names = list(self._slots)
        self._shards: dict[str, Any] = {}
        for name, (places, key) in self._slots.items():
            tensor = places[key]
            if is_lazy(tensor):
                raise InvalidValueError(f"{name} is lazy, without a shape: run a forward before ModelEMA.")
            if tensor.is_meta:
                raise InvalidValueError(f"{name} is on the meta device: give the model its weights before ModelEMA.")
            if is_sharded(tensor):
                self._shards[name] = tensor

    @property
    def sharded(self) -> bool:
        """Whether some of them are shards of FSDP2."""
        return bool(self._shards)

    def check(self) -> None:
        """See whether the model has the averaged tensors, and no others, where they were found.

        Raises:
            UsageError: a layer was replaced, parametrized or added, or tied weights are no more.
        """
        known, now = ({n: (id(places), k) for n, (places, k) in s.items()} for s in (self._slots, self._averaged()))
        changed = [name for name in known | now if known.get(name) != now.get(name)]
        if changed:
            raise UsageError(
                f"{changed[:5]} came, went, or belong to another module than when ModelEMA was made: make it after "
                "parametrizing, replacing or adding layers."
            )

    def local(self) -> list[Tensor]:
        """The tensors that this rank holds.

        Raises:
            UsageError: one is no more where it was registered.
        """
        found = self._found()
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
    def kept(self) -> Iterator[Snapshot]:
        """The averaged tensors and every buffer as they are now, for `restore`; in the end they are put back."""
        self.reshard()
        buffers = [(m._buffers, key, b) for m in self.model.modules() for key, b in m._buffers.items() if b is not None]
        values = [tensor.detach().clone() for tensor in self.local()]
        snapshot = Snapshot(values, [(owner, key, b, _stored(b).clone()) for owner, key, b in buffers])
        try:
            yield snapshot
        finally:
            self.restore(snapshot)

    def restore(self, snapshot: Snapshot) -> None:
        """Put values and buffers back, into whatever tensors hold the weights by now.

        Raises:
            UsageError: a tensor has gone, or has another shape; all others are restored.
        """
        self.reshard()
        lost, moved = [], False
        with torch.inference_mode():  # which may write to tensors made in either mode
            for name, tensor, value in zip(self.names, self._found(), snapshot.values, strict=True):
                if tensor is None or tensor.shape != value.shape:
                    lost.append(name)
                    continue
                tensor.detach().copy_(value)
                moved = moved or (tensor.dtype, tensor.device) != (value.dtype, value.device)
            for owner, key, buffer, value in snapshot.buffers:
                now = owner.get(key)  # a forward may have put another one there, or `model.to` has, for good
                owner[key] = now if moved and now is not None and now.shape == buffer.shape else buffer
                _stored(owner[key]).copy_(value)
        if lost:
            raise UsageError(f"{lost[:5]} changed inside of applied(): the model's own weights have no place there.")

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

    def as_held(self, name: str, saved: Any) -> Tensor:
        """What this rank holds of a saved tensor.

        Raises:
            StateError: no tensor that can be copied, another shape, or sharded in another way.
        """
        whole: Any = self[name]
        if not isinstance(saved, Tensor):
            raise StateError(f"The state is damaged: {name} is no tensor, but {shown(saved)}.")
        if saved.is_meta or saved.layout is not torch.strided:
            raise StateError(f"The state's {name} has no values to copy: it is on {saved.device}, {saved.layout}.")
        if saved.is_complex() != whole.is_complex() or not (saved.is_complex() or saved.is_floating_point()):
            raise StateError(f"The state is of another model: {name} is of {saved.dtype}, for {whole.dtype}.")
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

    def _averaged(self) -> dict[str, Slot]:
        found: dict[str, Slot] = {}
        seen: set[int] = set()
        for name, (places, key) in _places(self.model, statistics=self._statistics):
            tensor = places[key]
            if id(tensor) not in seen and (tensor.is_floating_point() or tensor.is_complex()) and self.include(name):
                seen.add(id(tensor))
                found[name] = places, key
        return found

    def _found(self) -> list[Any]:
        if not self._shards:
            return [places.get(key) for places, key in self._slots.values()]
        slots = self._slots.items()
        return [self._shard(n)._local_tensor if n in self._shards else places.get(k) for n, (places, k) in slots]

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


def _stored(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions of `expand`: nothing can be written to those."""
    for dim, stride in enumerate(tensor.stride() if tensor.layout is torch.strided else ()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, asked without importing them."""
    return hasattr(tensor, "_local_tensor")
