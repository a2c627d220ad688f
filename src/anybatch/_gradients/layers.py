"""The norms of a window by layer, at the steps where the record has them.

[Note: apart] At such a step every gradient is read once more, for a norm of its own. The norms of the whole model are
taken as at any other step, so the training does not change by a bit. Other steps cost nothing more.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from anybatch._gradients.norms import norm_into, part_of, total_squared_norm
from anybatch._gradients.probe import Placement, Probe, Table
from anybatch._gradients.window import Norms

# What torch.compile and activation checkpointing put into names.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


class LayerNorms(Probe):
    """The norms of each layer.

    Args:
        model: whose modules the layers are.
        due: whether the next step is measured by layer; the same on every rank, and from one step to the next.
    """

    name = "layers"

    def __init__(self, model: nn.Module, *, due: Callable[[], bool]) -> None:
        self._model = model
        self._due = due
        self.drop()

    def drop(self) -> None:
        """Drop all parameters."""
        self._layer_of: dict[int, str] = {}  # by a parameter's identity, in the model's order
        self._keys: list[int] = []  # the identities of the parameters
        self.names: tuple[str, ...] = ()
        self._places: list[int] = []  # for each parameter, that of its layer among the names
        self._table = Table()
        self._open = False

    @property
    def size(self) -> int:
        """The number of layers."""
        return len(self.names)

    def follow(self, parameters: Sequence[Tensor], places: Sequence[Placement]) -> None:
        """Measure these parameters as well."""
        for name, p in self._model.named_parameters():
            self._layer_of[id(p)] = layer_of(name, self._model)
        for new in parameters:
            self._layer_of.setdefault(id(new), f"parameter {len(self._layer_of)}")  # added from outside of the model
        self._keys.extend(map(id, parameters))
        mine = set(self._keys)
        self.names = tuple(dict.fromkeys(name for key, name in self._layer_of.items() if key in mine))
        position = {name: place for place, name in enumerate(self.names)}
        self._places = [position[self._layer_of[key]] for key in self._keys]
        self._table.follow(places)
        self._open = False

    def open(self, *, sampled: bool) -> bool:  # noqa: ARG002
        """Begin a window."""
        self._table.clear()
        self._open = self._due()
        return self._open

    def sample(self, row: int, index: int, parameter: Tensor, grad: Tensor) -> None:  # noqa: ARG002
        """Measure the gradient that a parameter got from micro-batch `row`."""
        norm_into(self._table.cell(row, index), grad)

    def samples(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:  # noqa: ARG002
        """Measure all gradients of a window at once."""
        self._table.observe([total_squared_norm([samples]) for samples in gradients], gradients[0].shape[0])

    def mean(self, parameters: Sequence[Tensor]) -> None:
        """Measure this rank's part of `.grad`."""
        for p, out in zip(parameters, self._table.mean_cells(parameters), strict=True):
            if p.grad is None:
                out.zero_()
            else:
                norm_into(out, part_of(p.grad, p))
        self._table.mean_written()

    def forget_mean(self) -> None:
        """The norms of `.grad` are out of date."""
        self._table.forget_mean()

    def norms(self, fires: Sequence[int]) -> Norms | None:
        """The norms, `[layers]`; `None` where this window was not measured by layer."""
        if not self._open:
            return None
        samples, mean = self._table.squares(fires)
        return Norms(self._summed(samples), None if mean is None else self._summed(mean))

    def _summed(self, squares: Tensor) -> Tensor:
        places = torch.tensor(self._places, device=squares.device)
        return squares.new_zeros(len(self.names)).index_add_(0, places, squares)


def layer_of(name: str, model: nn.Module) -> str:
    """The module that the parameter `name` of `model` belongs to, without the names of wrappers.

    A parameter of the model itself is a layer of its own.
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
