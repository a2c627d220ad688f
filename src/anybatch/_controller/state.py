"""The controller's saved state: a flat dictionary of numbers, all checked before any is used."""

import warnings
from collections.abc import Mapping
from typing import Any

from anybatch._controller.gain_estimator import RunningMoments
from anybatch._errors import AnybatchWarning, StateError
from anybatch._numbers import MOST, real, shown
from anybatch._scaling import Averages

STATE_VERSION = 3  # 2: the averages in Adam's metric; 3: how many backwards the last window had, and the samples' age
_NEW_IN_3 = {"backwards": 0.0, "age": 1.0, "metric_age": 1.0}
_NEW: dict[float, dict[str, float]] = {1: _NEW_IN_3, 2: _NEW_IN_3}
# The averages in each metric but the Euclidean; a state from before the metric has none of these numbers.
_METRICS = [prefix for prefix in RunningMoments.prefixes().values() if prefix]
_PREFIXES = ("", *_METRICS)

# The least and the most that a number may be; of those without a line any finite one may come up.
_COUNTS = (
    *("steps", "skipped", "parameters", "version", "backwards"),
    *(prefix + name for prefix in _PREFIXES for name in ("samples", "age")),
)
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys((*_COUNTS, "base_batch", "tau", *(f"{prefix}iterations" for prefix in _PREFIXES)), (0, MOST)),
    **dict.fromkeys((f"{prefix}weight" for prefix in _PREFIXES), (0, 1 + 1e-9)),  # a long sum of them ends beside 1
    "schedule_offset": (-1, MOST),  # torch's schedulers are at -1 before their first step
}
_LARGEST = 1e100  # of an averaged moment: far above any of float32 gradients, and its square is a float
_WHOLE = (*_COUNTS, "schedule_offset")


def checked_numbers(state: object, *, whose: str) -> dict[str, float]:
    """The numbers of a flat state by their names.

    Raises:
        StateError: it is not a mapping of names to finite numbers.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"Not the state of {whose}: pass the result of its state_dict(), got {shown(state)}.")
    values = {}
    for name, value in state.items():
        number = real(value)
        if not isinstance(name, str) or number is None:
            raise StateError(f"Not the state of {whose}: {shown(name)} is not a finite number, got {shown(value)}.")
        values[name] = number
    return values


def checked_state(state: Mapping[str, Any], *, mine: Mapping[str, float]) -> dict[str, float]:
    """The numbers of `state`, if a run with the state `mine` can continue from it.

    Raises:
        StateError: it has other names, a newer version, an impossible number, or another model or base batch.
    """
    values = checked_numbers(state, whose="a controller")
    if values.get("version", 0) > STATE_VERSION:
        raise StateError(
            f"The state has version {values['version']:g}, this anybatch reads up to {STATE_VERSION}: upgrade anybatch."
        )
    for prefix in _METRICS:
        if not any(name.startswith(prefix) for name in values):
            values |= {prefix + name: float(value) for name, value in vars(Averages()).items()}
    if (version := values.get("version")) in _NEW:
        values = {**_NEW[version], **values, "version": float(STATE_VERSION)}
    if set(values) != set(mine):
        odd = sorted(set(values) ^ set(mine))
        raise StateError(f"Not a controller's state: {shown(odd)} are missing or unknown.")
    for name, (least, most) in _RANGES.items():
        if not least <= values[name] <= most or (name in _WHOLE and not values[name].is_integer()):
            kind = "a whole number" if name in _WHOLE else "a number"
            raise StateError(
                f"The state is damaged: {name} is {kind} from {least:g} to {most:.16g}, got {values[name]!r}. Load the "
                "unchanged result of state_dict()."
            )
    if values["version"] != STATE_VERSION:
        raise StateError(f"The state is damaged: there is no version {values['version']:g}.")
    for prefix in _PREFIXES:
        names = [prefix + name for name in ("variance", "sqnorm", "weight", "samples")]
        variance, sqnorm, weight, samples = (values[name] for name in names)
        if (samples > 0) != (weight > 0) or max(abs(variance), abs(sqnorm)) > _LARGEST * weight:
            raise StateError(f"The state is damaged: { ({n: values[n] for n in names}) } contradict each other.")
    if values["parameters"] != mine["parameters"]:
        raise StateError(
            f"The state is of a model with {values['parameters']:.0f} parameters in its optimizers, this one has "
            f"{mine['parameters']:.0f}."
        )
    if values["base_batch"] and mine["base_batch"] and values["base_batch"] != mine["base_batch"]:
        raise StateError(
            f"The state was measured for base_batch={values['base_batch']:g}, this controller has "
            f"{mine['base_batch']:g}: pass attach the base_batch that the hyperparameters were tuned for."
        )
    if values["samples"] > 0 and bool(values["base_batch"]) != bool(mine["base_batch"]):
        with_it, without = ("state", "controller") if values["base_batch"] else ("controller", "state")
        warnings.warn(
            f"The {with_it} has base_batch={values['base_batch'] or mine['base_batch']:g}, and the {without} has none, "
            "as with scale='count' or a number. The averaged variance is that of one base batch. If the two base "
            "batches differ in size, the gain is wrong for a while: pass attach the sizes in the same form.",
            AnybatchWarning,
            stacklevel=3,
        )
    return values
