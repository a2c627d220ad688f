"""The saved state of a ModelEMA and its validation."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from anybatch._ema.tensors import clean
from anybatch._errors import StateError
from anybatch._numbers import real, shown, whole

STATE_VERSION = 2


def numbers(decays: Sequence[float], *, tau: float, pending: float, waiting: int) -> dict[str, Any]:
    """Return the state without the averages; "decay" is a list for several decays."""
    decay = decays[0] if len(decays) == 1 else list(decays)
    return {"version": STATE_VERSION, "decay": decay, "tau": tau, "pending": pending, "waiting": waiting}


def averages_keys(decays: Sequence[float]) -> list[str]:
    """Return the key of the state for the averages of each decay."""
    return ["averages" if i == 0 else f"averages_{i}" for i in range(len(decays))]


def checked_state(state: Mapping[str, Any], *, decays: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """Return the state in the current version, with these decays and names; the tensors are not checked.

    Raises:
        StateError: The state is newer, of another model, of other decays, or not the state of a ModelEMA.
    """
    if not isinstance(state, Mapping) or not {"version", "decay", "averages"} <= set(state):
        raise StateError(
            "Not the state of a ModelEMA: it needs version, decay and averages. ema_state_from(...) reads the states "
            "of other libraries."
        )
    version = whole(state["version"])
    if version is None or version < 1:
        raise StateError(f"The state is damaged: version {shown(state['version'])} does not exist.")
    if version > STATE_VERSION:
        raise StateError(
            f"The state has version {version}; this anybatch reads up to {STATE_VERSION}. Upgrade anybatch."
        )
    keys = averages_keys(decays)
    for key in keys:
        found = state.get(key, {})
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise StateError(f"The state is damaged: {key} must be tensors by name, got {shown(type(found))}.")
    state = dict(state) if version >= STATE_VERSION else _upgraded(state, names)
    if set(state) != {*numbers(decays, tau=0, pending=0, waiting=0), *keys}:
        raise StateError(f"Not the state of a ModelEMA with {len(decays)} decays: it has {shown(list(state))}.")
    for key in keys:
        odd = sorted(set(state[key]) ^ set(names))
        if odd:
            raise StateError(f"The state is of another model: {odd[:5]} are missing or unknown.")
    return {**state, **_checked_numbers(state, decays)}


def _checked_numbers(state: Mapping[str, Any], decays: Sequence[float]) -> dict[str, Any]:
    saved = state["decay"] if isinstance(state["decay"], list | tuple) else [state["decay"]]
    known = [number for number in map(real, saved) if number is not None and 0 <= number < 1]
    if len(known) != len(saved):
        raise StateError(f"The state is damaged: decay must be in [0, 1), got {shown(state['decay'])}.")
    if len(known) != len(decays) or (len(decays) > 1 and known != list(decays)):
        raise StateError(
            f"The state has averages of the decays {shown(state['decay'])}, this ModelEMA has {list(decays)}. "
            "Load it into a ModelEMA with the same decays."
        )
    # tau is infinite where a warm-up in another library is over.
    tau = inf if isinstance(state["tau"], float) and state["tau"] == inf else real(state["tau"])
    pending, waiting = real(state["pending"]), whole(state["waiting"])
    for name, value in (("tau", tau), ("pending", pending), ("waiting", waiting)):
        if value is None or value < 0:
            kind = "whole number" if name == "waiting" else "number"
            raise StateError(f"The state is damaged: {name} must be a {kind} >= 0, got {shown(state[name])}.")
    return {"tau": tau, "pending": pending, "waiting": waiting}


def _upgraded(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Upgrade version 1, which had no warm-up (tau is infinite) and the parameter names of the wrapped model."""
    averages = {clean(name): value for name, value in state["averages"].items()}
    if set(averages) != set(names) and all(name.startswith("module.") for name in averages):
        averages = {name.removeprefix("module."): value for name, value in averages.items()}
    return {**state, "version": STATE_VERSION, "tau": inf, "pending": 0.0, "waiting": 0, "averages": averages}
