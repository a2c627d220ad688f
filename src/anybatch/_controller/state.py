"""The controller's saved state: a flat dictionary of numbers, checked name by name before any of it is used."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from anybatch._errors import StateError
from anybatch._scaling import Averages

STATE_VERSION = 2  # 2: the averages in Adam's metric
_NEW_IN_2 = {f"metric_{name}": value for name, value in vars(Averages()).items()}


def checked_state(state: Mapping[str, Any], *, mine: Mapping[str, float]) -> dict[str, float]:
    """The numbers of `state`, if it can go on where `mine` is.

    Raises:
        StateError: it has other names or a newer version, or is of another model or base batch.
    """
    try:
        values = {name: float(value) for name, value in state.items()}
    except (AttributeError, TypeError, ValueError):
        raise StateError("Not a controller's state: it holds something that is not a number.") from None
    if values.get("version", 0) > STATE_VERSION:
        raise StateError(
            f"The state has version {values['version']:g}, this anybatch reads up to {STATE_VERSION}: upgrade anybatch."
        )
    if values.get("version") == 1:
        values = {**_NEW_IN_2, **values}
    if set(values) != set(mine):
        raise StateError(f"Not a controller's state: {sorted(set(values) ^ set(mine))} are missing or unknown.")
    if not all(isfinite(value) for value in values.values()):
        raise StateError("The state holds a number that is not finite.")
    if values["parameters"] != mine["parameters"]:
        raise StateError(
            f"The state is of a model with {values['parameters']:.0f} trained parameters, this one has "
            f"{mine['parameters']:.0f}."
        )
    if values["base_batch"] and mine["base_batch"] and values["base_batch"] != mine["base_batch"]:
        raise StateError(
            f"The state was measured for base_batch={values['base_batch']:g}, this controller has "
            f"{mine['base_batch']:g}: the hyperparameters are tuned for one base batch, keep it."
        )
    return values
