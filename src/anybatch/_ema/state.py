"""The saved state of a ModelEMA, checked before any of it is used."""

from collections.abc import Mapping, Sequence
from math import inf, isinf, nan
from typing import Any

from torch import Tensor

from anybatch._ema.tensors import clean
from anybatch._errors import StateError

STATE_VERSION = 2


def numbers(decays: Sequence[float], *, tau: float, pending: float, waiting: int) -> dict[str, Any]:
    """All of a state but the averages; "decay" is a list if there are several."""
    decay = decays[0] if len(decays) == 1 else list(decays)
    return {"version": STATE_VERSION, "decay": decay, "tau": tau, "pending": pending, "waiting": waiting}


def averages_keys(decays: Sequence[float]) -> list[str]:
    """Under which keys the averages of each decay are saved."""
    return ["averages" if i == 0 else f"averages_{i}" for i in range(len(decays))]


def checked_state(state: Mapping[str, Any], *, decays: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """The state in today's form, if it has averages of these decays and names; shapes are not looked at.

    Raises:
        StateError: it is newer, of another model, of other decays, or no state of a ModelEMA; or it holds a number
            that cannot be.
    """
    if not isinstance(state, Mapping) or not {"version", "decay", "averages"} <= set(state):
        raise StateError(
            "Not the state of a ModelEMA: it needs version, decay and averages. ema_state_from(...) reads the states "
            "of other libraries."
        )
    if not isinstance(state["version"], int) or state["version"] < 1:
        raise StateError(f"Not the state of a ModelEMA: its version is {state['version']!r}.")
    if state["version"] > STATE_VERSION:
        raise StateError(f"The state has version {state['version']}, this anybatch reads up to {STATE_VERSION}.")
    keys = averages_keys(decays)
    if not all(_is_named_tensors(state[key]) for key in keys if key in state):
        raise StateError(f"Not the state of a ModelEMA: its {' and '.join(keys)} are not tensors by their names.")
    state = dict(state) if state["version"] >= STATE_VERSION else _upgraded(state, names)
    if set(state) != {*numbers(decays, tau=0, pending=0, waiting=0), *keys}:
        raise StateError(f"Not the state of a ModelEMA with {len(decays)} decays: it has {sorted(state)}.")
    if len(decays) > 1 and (not isinstance(state["decay"], list | tuple) or list(state["decay"]) != list(decays)):
        raise StateError(f"The state has the averages of decays {state['decay']}, this object {list(decays)}.")
    _check_numbers(state)
    for key in keys:
        odd = sorted(set(state[key]) ^ set(names))
        if odd:
            raise StateError(f"The state is of another model: {odd[:5]} are missing or unknown.")
    return state


def _is_named_tensors(values: Any) -> bool:
    return isinstance(values, Mapping) and all(isinstance(value, Tensor) for value in values.values())


def _check_numbers(state: Mapping[str, Any]) -> None:
    """Only the clock may be infinite: a warm-up that is over."""
    values = {name: _number(state[name]) for name in ("tau", "pending", "waiting")}
    if not all(value >= 0 for value in values.values()) or isinf(values["pending"]) or values["waiting"] % 1 != 0:
        given = {name: state[name] for name in values}
        raise StateError(f"Not the state of a ModelEMA: it holds a number that cannot be, {given}.")


def _number(value: Any) -> float:
    try:
        return nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return nan


def _upgraded(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Version 1 had no warm-up, whose end infinity is, and the names of a model as it was wrapped."""
    averages = {clean(name): value for name, value in state["averages"].items()}
    if set(averages) != set(names) and all(name.startswith("module.") for name in averages):
        averages = {name.removeprefix("module."): value for name, value in averages.items()}
    return {**state, "version": STATE_VERSION, "tau": inf, "pending": 0.0, "waiting": 0, "averages": averages}
