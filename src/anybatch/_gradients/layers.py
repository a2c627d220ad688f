"""The norms of a window by layer, at the steps that the record has by layer.

[Note: apart] At a step with these norms every gradient is read once more. The norms of the whole model are taken as at
any other step, so the training does not change by a bit. Other steps have no extra cost.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from anybatch._gradients.norms import norm_into, total_squared_norm
from anybatch._gradients.probe import OnDevices, Placement, Probe, Table
from anybatch._gradients.window import Norms

# The parts of names that torch.compile and activation checkpointing add.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


class LayerNorms(Probe):
    """The norms of each layer of `model`.

    `due` returns whether the next step is measured by layer: the same on every rank, and until that step.
    """

    name = "layers"

    def __init__(self, model: nn.Module, *, due: Callable[[], bool]) -> None:
        self._model = model
        self._due = due
        self.drop()

    def drop(self) -> None:
        """Drop all parameters."""
        self._layer_of: dict[int, str] = {}  # by the identity of a parameter, in the model's order
        self._keys: list[int] = []  # the identities of the parameters
        self._measured: set[int] = set()  # those of parameters with a part of the norms
        self.names: tuple[str, ...] = ()
        self._places = OnDevices([])  # for each parameter, the index of its layer in the names
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
            self._layer_of.setdefault(id(new), f"parameter {len(self._layer_of)}")  # not in the model
        self._keys.extend(map(id, parameters))
        self._measured.update(id(p) for p, place in zip(parameters, places, strict=True) if place.measured)
        self.names = tuple(dict.fromkeys(name for key, name in self._layer_of.items() if key in self._measured))
        position = {name: place for place, name in enumerate(self.names)}
        # An unmeasured one adds 0.
        self._places = OnDevices([position.get(self._layer_of[key], 0) for key in self._keys])
        self._table.follow(places)
        self._open = False

    def open(self, *, sampled: bool) -> bool:  # noqa: ARG002
        """Begin a window."""
        self._table.clear()
        self._open = self._due()
        if not self._open:
            self._table.free()
        return self._open

    def sample(self, row: int, index: int, parameter: Tensor, grad: Tensor, *, held: bool) -> None:  # noqa: ARG002
        """Measure the gradient that a parameter got from micro-batch `row`."""
        norm_into(self._table.cell(row, index), grad)

    def measure(self) -> None:
        """Nothing is held."""

    def samples(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:  # noqa: ARG002
        """Measure all gradients of a window at once."""
        self._table.observe([total_squared_norm([samples]) for samples in gradients], gradients[0].shape[0])

    def mean(self, parameters: Sequence[Tensor]) -> None:
        """Measure this rank's part of `.grad`."""
        self._table.write_mean(parameters, lambda out, _, grad: norm_into(out, grad))

    def forget_mean(self) -> None:
        """Drop the norms of `.grad`."""
        self._table.forget_mean()

    def norms(self, fires: Sequence[int]) -> Norms | None:
        """The norms, `[layers]`; `None` where this window is not measured by layer."""
        if not self._open:
            return None
        samples, mean = self._table.squares(fires)
        return Norms(self._summed(samples), None if mean is None else self._summed(mean))

    def _summed(self, squares: Tensor) -> Tensor:
        return squares.new_zeros(len(self.names)).index_add_(0, self._places.on(squares.device), squares)


def layer_of(name: str, model: nn.Module) -> str:
    """The module of the parameter `name`, without wrappers; a parameter of `model` itself is a layer of its own."""
    *parts, last = name.split(".")
    kept, module = list[str](), model
    for part in parts:
        if part == "parametrizations":  # the factors of a weight norm belong to the layer
            break
        if part not in _WRAPPERS and not isinstance(module, DataParallel | DistributedDataParallel):
            kept.append(part)
        module = module.get_submodule(part)
    return ".".join(kept) or last
