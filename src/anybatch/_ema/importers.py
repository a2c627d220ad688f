"""Model averages of other libraries, read from their states."""

from collections.abc import Mapping
from math import inf, isclose
from typing import Any

from torch import Tensor

from anybatch._ema.model_ema import ModelEMA
from anybatch._ema.tensors import clean
from anybatch._errors import InvalidValueError, StateError
from anybatch._numbers import real, shown, whole

_KNOWN = (
    "torch.optim.swa_utils.AveragedModel, timm's ModelEmaV2 and V3, ema-pytorch, diffusers' EMAModel, torch_ema, and a "
    "model's own state_dict"
)
# How each of them counts its updates; timm and a bare model do not.
_COUNTERS = ("n_averaged", "step", "optimization_step", "num_updates")
# What their constructors take, and a state may have been given besides.
_SETTINGS = ("update_every", "beta", "decay")


def ema_state_from(state: Mapping[str, Any], *, ema: ModelEMA, update_every: int | None = None) -> dict[str, Any]:
    """The state of another library's model average, in the form that `ema.load_state_dict` takes.

        decay per base iteration = decay per update ** (1 / update_every)

    Recognised by their names are the `state_dict()` of torch.optim.swa_utils.AveragedModel, of timm's ModelEmaV2 and
    ModelEmaV3, of ema-pytorch, of diffusers' EMAModel and of torch_ema (both lists in the order of the parameters), and
    a model's own whose weights are averages. The decay is the one of `ema`, per base iteration. An average that moved
    once in n base iterations has another decay per update, and its state does not hold n. Where n is above 1, the decay
    of `ema` is compared with the formula, for their decay as the state has it under "decay" or "beta".
    Each update that theirs has counted is `update_every` base iterations. ema-pytorch's counter is one of calls, and so
    of base iterations already. Where nothing is counted, a warm-up is taken to be over.

    Args:
        state: what the other library's `state_dict()` gave, with whole tensors. It may hold the values that their
            constructor was given as well: `{**theirs.state_dict(), "beta": 0.9999, "update_every": 10}`.
        ema: the average that is to go on from it, with one decay; it is only read.
        update_every: base iterations from one of their updates to the next, at least 1; by default what the state says,
            and 1. A state of ema-pytorch needs it, as its own default is 10.

    Returns:
        A state of `ema`.

    Raises:
        StateError: the state is of another model, or of no library known here.
        InvalidValueError: `ema` averages at several decays; `update_every` is needed, or no number of base iterations;
            or the decay of `ema` is not theirs per base iteration.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> theirs = torch.optim.swa_utils.AveragedModel(model)
        >>> theirs.update_parameters(model)
        >>> ema = anybatch.ModelEMA(model, 0.999)
        >>> ema.load_state_dict(anybatch.ema_state_from(theirs.state_dict(), ema=ema))
        >>> ema.tau
        1.0
        >>> torch_ema = {"decay": 0.99, "num_updates": 3, "shadow_params": list(model.parameters())}
        >>> ema = anybatch.ModelEMA(model, 0.99 ** (1 / 10))     # theirs moved once in 10 iterations
        >>> ema.load_state_dict(anybatch.ema_state_from(torch_ema, ema=ema, update_every=10))
        >>> ema.tau
        30.0
    """
    own = ema.state_dict()
    if isinstance(own["decay"], list):
        raise InvalidValueError("The state has one average: give a ModelEMA with one decay.")
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise StateError(f"A state dict is needed, values by their names, got {shown(state)}: pass its state_dict().")
    names = list(own["averages"])
    listed, known = "shadow_params" in state, {clean(key) for key in ema._tensors.model.state_dict()}
    bare = not listed and set(names) <= {clean(key) for key in state}  # a "step" in it may be the model's own
    own_names = known if bare else set()
    counters = [counter for counter in _COUNTERS if counter in state and counter not in own_names]
    settings = {key: state[key] for key in _SETTINGS if key in state and key not in own_names}
    if listed:
        found = _listed(state["shadow_params"], ema)
    else:
        found = _named({k: v for k, v in state.items() if k not in {*counters, *settings}}, names, known)
    missing = [name for name in names if name not in found]
    if missing:
        raise StateError(f"The state has no averages of {missing[:5]}: leave them out with ModelEMA(include=...).")
    for name in names:
        ema._tensors.as_held(name, found[name])  # which raises if it does not fit
    every = _every(settings, update_every, needed="initted" in state and "initted" not in own_names)
    if every > 1 and not callable(ema.decay):  # a function of the clock does not depend on how often it is asked
        _compare(own["decay"], settings, every)
    averages = {name: found[name] for name in names}
    return {**own, "tau": _iterations(state, counters, every), "pending": 0.0, "waiting": 0, "averages": averages}


def _every(settings: Mapping[str, Any], given: int | None, *, needed: bool) -> int:
    """Base iterations from one of their updates to the next.

    Raises:
        InvalidValueError: it is no such number, or not known where it is needed.
    """
    if given is None and "update_every" not in settings:
        if needed:
            raise InvalidValueError(
                "A state of ema-pytorch does not hold its update_every, which is 10 by default. Pass "
                "ema_state_from(..., update_every=...) with its value. If it is above 1, make ModelEMA with the decay "
                "beta ** (1 / update_every), which is per base iteration."
            )
        return 1
    value = settings["update_every"] if given is None else given
    every = whole(value)
    if every is None or every < 1:
        raise InvalidValueError(f"update_every is a number of base iterations, at least 1, got {shown(value)}.")
    return every


def _compare(own: float, settings: Mapping[str, Any], every: int) -> None:
    """See whether the decay of `ema` is theirs per base iteration.

    Raises:
        InvalidValueError: it is not, or theirs is not known.
    """
    given = settings.get("beta", settings.get("decay"))
    theirs = real(given)
    if theirs is None or not 0 <= theirs < 1:
        raise InvalidValueError(
            f"With update_every={every} their decay per update is needed, in [0, 1), got {shown(given)}. Put it into "
            'the state: ema_state_from({**state, "beta": 0.9999}, ...).'
        )
    decay = theirs ** (1 / every)
    if not isclose(1 - own, 1 - decay, rel_tol=1e-3):
        raise InvalidValueError(
            f"Their average moves once in {every} base iterations with a decay of {theirs:g}, so its decay per base "
            f"iteration is {decay!r}; ema has {own:g}. Use ModelEMA(model, decay={theirs:g} ** (1 / {every}), ...)."
        )


def _iterations(state: Mapping[str, Any], counters: list[str], every: int) -> float:
    """Base iterations of the updates that the first counter that counts has seen; infinity without one."""
    for counter in counters:
        if state[counter] is not None:
            count = whole(state[counter])
            if count is None or count < 0:
                raise StateError(
                    f"The state is damaged: {counter} is a number of updates, got {shown(state[counter])}."
                )
            return float(count if counter == "step" else count * every)  # ema-pytorch's step counts every call
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
