"""Conversion of the states of other libraries' model averages."""

from collections.abc import Mapping
from math import inf, isclose
from typing import Any

from torch import Tensor

from anybatch._ema.model_ema import ModelEMA
from anybatch._ema.tensors import clean
from anybatch._errors import InvalidValueError, StateError
from anybatch._numbers import real, shown, whole

# The counters of updates in these libraries. timm and a bare model have none.
_COUNTERS = ("n_averaged", "step", "optimization_step", "num_updates")
# Arguments of their constructors, which the user may add to a state.
_SETTINGS = ("update_every", "beta", "decay")


def ema_state_from(state: Mapping[str, Any], *, ema: ModelEMA, update_every: int | None = None) -> dict[str, Any]:
    """Convert another library's model average for `ema.load_state_dict`.

        decay per base iteration = decay per update ** (1 / update_every)

    The keys identify the library: torch.optim.swa_utils.AveragedModel, timm's ModelEmaV2 and ModelEmaV3, ema-pytorch,
    diffusers' EMAModel or torch_ema. The last two save a list in the order of the parameters. The `state_dict()` of a
    model whose weights are averages is read too.

    The result has the decay of `ema`, per base iteration. For `update_every` above 1 that decay is compared with the
    formula, where the decay per update is the state's "decay" or "beta". Each update that the state counts is
    `update_every` base iterations. The counter of ema-pytorch counts calls, which are base iterations. Without a
    counter, the warm-up counts as over.

    Args:
        state: The other library's `state_dict()`, with whole tensors. It may include arguments of its constructor:
            `{**theirs.state_dict(), "beta": 0.9999, "update_every": 10}`.
        ema: The average, with one decay, that will load the result. It is not changed.
        update_every: Base iterations between two updates, at least 1. By default the state's value, or 1. A state of
            ema-pytorch needs it, because its default is 10.

    Returns:
        A state of `ema`.

    Raises:
        StateError: The state is of another model or of an unknown library.
        InvalidValueError: `ema` has several decays, `update_every` is missing or invalid, or the decay of `ema` is not
            the state's per base iteration.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> theirs = torch.optim.swa_utils.AveragedModel(model)
        >>> theirs.update_parameters(model)
        >>> ema = anybatch.ModelEMA(model, 0.999)
        >>> ema.load_state_dict(anybatch.ema_state_from(theirs.state_dict(), ema=ema))
        >>> ema.tau
        1.0
        >>> torch_ema = {"decay": 0.99, "num_updates": 3, "shadow_params": list(model.parameters())}
        >>> ema = anybatch.ModelEMA(model, 0.99 ** (1 / 10))     # one update in 10 iterations
        >>> ema.load_state_dict(anybatch.ema_state_from(torch_ema, ema=ema, update_every=10))
        >>> ema.tau
        30.0
    """
    own = ema.state_dict()
    if isinstance(own["decay"], list):
        raise InvalidValueError("The state has one average: pass a ModelEMA with one decay.")
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise StateError(f"state must be a state_dict(), values by name, got {shown(state)}.")
    names = list(own["averages"])
    listed, known = "shadow_params" in state, {clean(key) for key in ema._tensors.model.state_dict()}
    bare = not listed and set(names) <= {clean(key) for key in state}  # its "step" may be the model's own
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
        ema._tensors.as_held(name, found[name])  # raises if the tensor does not fit
    every = _every(settings, update_every, needed="initted" in state and "initted" not in own_names)
    if every > 1 and not callable(ema.decay):  # a function of the clock has no decay per update
        _compare(own["decay"], settings, every)
    averages = {name: found[name] for name in names}
    return {**own, "tau": _iterations(state, counters, every), "pending": 0.0, "waiting": 0, "averages": averages}


def _every(settings: Mapping[str, Any], update_every: int | None, *, needed: bool) -> int:
    """Return the number of base iterations between two updates."""
    if update_every is None and "update_every" not in settings:
        if needed:
            raise InvalidValueError(
                "A state of ema-pytorch does not hold its update_every, which is 10 by default. Pass "
                "ema_state_from(..., update_every=...) with its value. If it is above 1, make ModelEMA with the decay "
                "beta ** (1 / update_every), which is per base iteration."
            )
        return 1
    value = settings["update_every"] if update_every is None else update_every
    every = whole(value)
    if every is None or every < 1:
        raise InvalidValueError(f"update_every must be a whole number of base iterations >= 1, got {shown(value)}.")
    return every


def _compare(own: float, settings: Mapping[str, Any], every: int) -> None:
    """Check that the decay of `ema` is the state's decay per base iteration."""
    value = settings.get("beta", settings.get("decay"))
    per_update = real(value)
    if per_update is None or not 0 <= per_update < 1:
        raise InvalidValueError(
            f"With update_every={every} a decay per update is needed, in [0, 1), got {shown(value)}. Add it to the "
            'state: ema_state_from({**state, "beta": 0.9999}, ...).'
        )
    decay = per_update ** (1 / every)
    if not isclose(1 - own, 1 - decay, rel_tol=1e-3):
        raise InvalidValueError(
            f"The state's average has the decay {per_update:g} for each {every} base iterations, which is {decay!r} "
            f"per base iteration; ema has {own:g}. Use ModelEMA(model, decay={per_update:g} ** (1 / {every}), ...)."
        )


def _iterations(state: Mapping[str, Any], counters: list[str], every: int) -> float:
    """Return the base iterations that the first counter with a value has counted; infinity without a counter."""
    for counter in counters:
        if state[counter] is not None:
            count = whole(state[counter])
            if count is None or count < 0:
                raise StateError(
                    f"The state is damaged: {counter} must be a number of updates, got {shown(state[counter])}."
                )
            return float(count if counter == "step" else count * every)  # ema-pytorch's step counts each call
    return inf


def _listed(shadows: Any, ema: ModelEMA) -> dict[str, Tensor]:
    """Return by name the averages of a list in the order of all parameters, or of the trained ones."""
    if not isinstance(shadows, list | tuple) or not all(isinstance(shadow, Tensor) for shadow in shadows):
        raise StateError(f"The state is damaged: shadow_params must be a list of tensors, got {shown(shadows)}.")
    ema._tensors.reshard()
    parameters = [(clean(name), p) for name, p in ema._tensors.model.named_parameters()]
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    for these in (parameters, trained):
        if [p.shape for _, p in these] == [shadow.shape for shadow in shadows]:
            return {name: shadow for (name, _), shadow in zip(these, shadows, strict=True)}
    raise StateError(
        f"The state is of another model: it lists {len(shadows)} tensors, this model has {len(parameters)} parameters, "
        f"{len(trained)} of them trained, and the shapes differ in this order."
    )


def _named(state: Mapping[str, Any], names: list[str], known: set[str]) -> dict[str, Tensor]:
    """Return the averages by the model's names, without the library's and DistributedDataParallel's prefixes."""
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
        "The state is of another model or of an unknown library. Known are torch.optim.swa_utils.AveragedModel, timm's "
        "ModelEmaV2 and V3, ema-pytorch, diffusers' EMAModel, torch_ema, and a model's own state_dict(). "
        f"The state has {sorted(tensors)[:3]}; this model needs {(lacking or names)[:3]}."
    )
