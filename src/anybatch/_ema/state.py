"""The saved state of a ModelEMA, checked before any of it is used."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from anybatch._ema.tensors import clean
from anybatch._errors import StateError
from anybatch._numbers import real, shown, whole

STATE_VERSION = 2


def numbers(decays: Sequence[float], *, tau: float, pending: float, waiting: int) -> dict[str, Any]:
    """All of a state but the averages; "decay" is a list if there are several."""
    decay = decays[0] if len(decays) == 1 else list(decays)
    return {"version": STATE_VERSION, "decay": decay, "tau": tau, "pending": pending, "waiting": waiting}


def averages_keys(decays: Sequence[float]) -> list[str]:
    """Under which keys the averages of each decay are saved."""
    return ["averages" if i == 0 else f"averages_{i}" for i in range(len(decays))]


def checked_state(state: Mapping[str, Any], *, decays: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """The state in today's form, if it has averages of these decays and names; the tensors are not looked at.

    Raises:
        StateError: it is newer, of another model, of other decays, or no state of a ModelEMA.
    """
    if not isinstance(state, Mapping) or not {"version", "decay", "averages"} <= set(state):
        raise StateError(
            "Not the state of a ModelEMA: it needs version, decay and averages. ema_state_from(...) reads the states "
            "of other libraries."
        )
    version = whole(state["version"])
    if version is None or version < 1:
        raise StateError(f"The state is damaged: there is no version {shown(state['version'])}.")
    if version > STATE_VERSION:
        raise StateError(f"The state has version {version}, this anybatch reads up to {STATE_VERSION}.")
    keys = averages_keys(decays)
    for key in keys:
        found = state.get(key, {})
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise StateError(f"The state is damaged: {key} are tensors by their names, got {shown(type(found))}.")
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
        raise StateError(f"The state is damaged: decay is in [0, 1), got {shown(state['decay'])}.")
    if len(known) != len(decays) or (len(decays) > 1 and known != list(decays)):
        raise StateError(f"The state has the averages of decays {shown(state['decay'])}, this object {list(decays)}.")
    # A warm-up that is over, in a state from elsewhere, is at infinity.
    tau = inf if isinstance(state["tau"], float) and state["tau"] == inf else real(state["tau"])
    pending, waiting = real(state["pending"]), whole(state["waiting"])
    for name, value in (("tau", tau), ("pending", pending), ("waiting", waiting)):
        if value is None or value < 0:
            kind = "whole number" if name == "waiting" else "number"
            raise StateError(f"The state is damaged: {name} is a {kind}, not negative, got {shown(state[name])}.")
    return {"tau": tau, "pending": pending, "waiting": waiting}


def _upgraded(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Version 1 had no warm-up, whose end infinity is, and the names of a model as it was wrapped."""
    averages = {clean(name): value for name, value in state["averages"].items()}
    if set(averages) != set(names) and all(name.startswith("module.") for name in averages):
        averages = {name.removeprefix("module."): value for name, value in averages.items()}
    return {**state, "version": STATE_VERSION, "tau": inf, "pending": 0.0, "waiting": 0, "averages": averages}
