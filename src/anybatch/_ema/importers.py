"""Model averages of other libraries, read from their states."""

from collections.abc import Mapping
from math import inf
from typing import Any

from torch import Tensor

from anybatch._ema.model_ema import ModelEMA
from anybatch._ema.tensors import clean
from anybatch._errors import InvalidValueError, StateError
from anybatch._numbers import shown, whole

_KNOWN = (
    "torch.optim.swa_utils.AveragedModel, timm's ModelEmaV2 and V3, ema-pytorch, diffusers' EMAModel, torch_ema, and a "
    "model's own state_dict"
)
# How each of them counts its updates; timm and a bare model do not.
_COUNTERS = ("n_averaged", "step", "optimization_step", "num_updates")


def ema_state_from(state: Mapping[str, Any], *, ema: ModelEMA) -> dict[str, Any]:
    """The state of another library's model average, in the form that `ema.load_state_dict` takes.

    Recognised by their names are the `state_dict()` of torch.optim.swa_utils.AveragedModel, of timm's ModelEmaV2 and
    ModelEmaV3, of ema-pytorch, of diffusers' EMAModel and of torch_ema (both lists in the order of the parameters), and
    a model's own whose weights are averages. The decay is the one of `ema`. Each update that theirs has counted is one
    base iteration; where none are counted, a warm-up is taken to be over.

    Args:
        state: what the other library's `state_dict()` gave, with whole tensors.
        ema: the average that is to go on from it, with one decay; it is only read.

    Returns:
        A state of `ema`.

    Raises:
        StateError: the state is of another model, or of no library known here.
        InvalidValueError: `ema` averages at several decays.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> theirs = torch.optim.swa_utils.AveragedModel(model)
        >>> theirs.update_parameters(model)
        >>> ema = anybatch.ModelEMA(model, 0.999)
        >>> ema.load_state_dict(anybatch.ema_state_from(theirs.state_dict(), ema=ema))
        >>> ema.tau
        1.0
    """
    own = ema.state_dict()
    if isinstance(own["decay"], list):
        raise InvalidValueError("The state has one average: give a ModelEMA with one decay.")
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise StateError(f"A state dict is needed, values by their names, got {shown(state)}: pass its state_dict().")
    names = list(own["averages"])
    listed, known = "shadow_params" in state, {clean(key) for key in ema._tensors.model.state_dict()}
    bare = not listed and set(names) <= {clean(key) for key in state}  # a "step" in it may be the model's own
    counters = [counter for counter in _COUNTERS if counter in state and not (bare and counter in known)]
    if listed:
        found = _listed(state["shadow_params"], ema)
    else:
        found = _named({key: value for key, value in state.items() if key not in counters}, names, known)
    missing = [name for name in names if name not in found]
    if missing:
        raise StateError(f"The state has no averages of {missing[:5]}: leave them out with ModelEMA(include=...).")
    for name in names:
        ema._tensors.as_held(name, found[name])  # which raises if it does not fit
    updates = _updates(state, counters)
    averages = {name: found[name] for name in names}
    return {**own, "tau": updates, "pending": 0.0, "waiting": 0, "averages": averages}


def _updates(state: Mapping[str, Any], counters: list[str]) -> float:
    """How many updates the first counter that counts has seen; infinity without one."""
    for counter in counters:
        if state[counter] is not None:
            count = whole(state[counter])
            if count is None or count < 0:
                raise StateError(
                    f"The state is damaged: {counter} is a number of updates, got {shown(state[counter])}."
                )
            return float(count)
    return inf


def _listed(shadows: Any, ema: ModelEMA) -> dict[str, Tensor]:
    """A list in the order of the parameters: of all, or of those that are trained."""
    if not isinstance(shadows, list | tuple) or not all(isinstance(shadow, Tensor) for shadow in shadows):
        raise StateError(f"The state is damaged: shadow_params is a list of tensors, got {shown(shadows)}.")
    ema._tensors.reshard()
    parameters = [(clean(name), p) for name, p in ema._tensors.model.named_parameters()]
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    for these in (parameters, trained):
        if [p.shape for _, p in these] == [shadow.shape for shadow in shadows]:
            return {name: shadow for (name, _), shadow in zip(these, shadows, strict=True)}
    raise StateError(
        f"The state has a list of {len(shadows)} tensors, the model {len(parameters)} parameters, {len(trained)} of "
        "them trained: their shapes do not agree in this order, it is of another model."
    )


def _named(state: Mapping[str, Any], names: list[str], known: set[str]) -> dict[str, Tensor]:
    """Averages under the model's names, below the library's and DistributedDataParallel's prefixes."""
    tensors = {clean(key): value for key, value in state.items()}
    if any(key.startswith("ema_model.") for key in tensors):
        kept = {key: value for key, value in tensors.items() if key.startswith("ema_model.")}
        tensors = {key.removeprefix("ema_model."): value for key, value in kept.items()}
    for prefix in ("", "module.", "module.module."):
        if all(prefix + name in tensors for name in names):
            unknown = sorted(key for key in tensors if key.removeprefix(prefix) not in known)
            if unknown:
                raise StateError(f"The state is of another model: this one has no {unknown[:5]}.")
            return {key.removeprefix(prefix): value for key, value in tensors.items()}
    lacking = [name for name in names if not any(key.endswith(name) for key in tensors)]
    raise StateError(
        f"The state is of another model, or of none of {_KNOWN}: it has {sorted(tensors)[:3]}, and this model needs "
        f"{(lacking or names)[:3]}."
    )
