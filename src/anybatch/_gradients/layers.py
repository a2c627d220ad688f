"""Layers: at the steps that are looked at, each layer's part of a window's two norms.

[Note: apart] At such a step every gradient is read once more, for a norm of its own; the norms of the whole are taken
as at any other step, small gradients together. So whether anybody looks changes no bit of the training, and a step that
nobody looks at costs what it costs without this room.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from anybatch._gradients.norms import norm_into
from anybatch._gradients.slots import Rows, Slots
from anybatch._gradients.window import ByLayer
from anybatch._gradients.witness import local_of

# What torch.compile and activation checkpointing put into names.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


class Layers:
    """The norms of one window by layer: cleared, then given every gradient, then read.

    Args:
        model: whose modules the layers are.
        due: whether the next step is looked at; the same on every rank, and from one step to the next.
    """

    def __init__(self, model: nn.Module, *, due: Callable[[], bool]) -> None:
        self._model = model
        self.due = due
        self._layer_of: dict[int, str] = {}  # by a parameter's identity, in the model's order
        self._parameters: list[Tensor] = []
        self._leaves: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        self._places: list[int] = []  # for each parameter, that of its layer among the names
        self._rows = Rows(self._leaves)
        self._grads: Slots | None = None
        self.clear()

    def follow(self, parameters: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        """Look at these too; `leaves` are the tensors on which their gradients arrive."""
        for name, p in self._model.named_parameters():
            self._layer_of[id(p)] = layer_of(name, self._model)
        for new in parameters:
            self._layer_of.setdefault(id(new), f"parameter {len(self._layer_of)}")  # added from outside of the model
        self._parameters.extend(parameters)
        self._leaves.extend(leaves)
        mine = {id(p) for p in self._parameters}
        self._names = tuple(dict.fromkeys(name for key, name in self._layer_of.items() if key in mine))
        places = {name: place for place, name in enumerate(self._names)}
        self._places = [places[self._layer_of[id(p)]] for p in self._parameters]
        self._rows = Rows(self._leaves)
        self._grads = None
        self.clear()

    def clear(self) -> None:
        """Nothing of a window is known."""
        self._observed: Tensor | None = None
        self._grad_squares: Tensor | None = None

    def sample(self, row: int, index: int, grad: Tensor) -> None:
        """The gradient that parameter `index` got from micro-batch `row`."""
        norm_into(self._rows.view(row, index), grad)

    def samples(self, samples: Sequence[Tensor]) -> None:
        """All gradients of a step at once, one tensor `[n, *shape]` a parameter."""
        for index, given in enumerate(samples):
            self.sample(0, index, given)
        first = self._rows.written([1] * len(samples))[0]
        self._observed = first.squares() / samples[0].shape[0] ** 2

    def grads(self) -> None:
        """`.grad` as it is now, this rank's part of it."""
        if self._grads is None:
            self._grads = Slots(self._parameters)
        for p, out in zip(self._parameters, self._grads.views, strict=True):
            if p.grad is None:
                out.zero_()
            else:
                norm_into(out, local_of(p.grad))
        self._grad_squares = self._grads.squares()

    def squares(self, fires: Sequence[int], *, known: bool) -> ByLayer:
        """The window's norms, of parameters that got `fires` gradients each; without them where they are not known."""
        if not known or self._grad_squares is None:
            return ByLayer(self._names)
        samples = self._observed
        if samples is None:
            samples = torch.stack([slots.squares() for slots in self._rows.written(fires)]).sum(0)
        return ByLayer(self._names, self._summed(samples), self._summed(self._grad_squares))

    def _summed(self, squares: Tensor) -> Tensor:
        places = torch.tensor(self._places, device=squares.device)
        return squares.new_zeros(len(self._names)).index_add_(0, places, squares)


def layer_of(name: str, model: nn.Module) -> str:
    """The module that the parameter `name` of `model` belongs to, as it was called before anything was wrapped around
    it; a parameter of the model itself is a layer of its own.
    """
    *parts, last = name.split(".")
    kept, module = list[str](), model
    for part in parts:
        if part == "parametrizations":  # a weight norm's factors belong to the layer
            break
        if part not in _WRAPPERS and not isinstance(module, DataParallel | DistributedDataParallel):
            kept.append(part)
        module = module.get_submodule(part)
    return ".".join(kept) or last
