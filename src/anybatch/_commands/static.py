"""Static values from a record: the values of its run, to be mapped by the mean gain at another batch."""

from dataclasses import dataclass
from inspect import signature
from math import ceil, inf
from os import PathLike
from typing import TYPE_CHECKING, Any

from anybatch._errors import InvalidValueError

if TYPE_CHECKING:
    from anybatch._forecast import Estimate, Forecast
    from anybatch._record import Columns

# Entries of a recorded parameter group that are values of the optimizer, as in its constructor.
_VALUES = ("lr", "betas", "eps", "weight_decay", "momentum", "alpha", "rho", "momentum_decay", "lr_decay")

_ADAM = (
    "With AdamW, constant values of the mean gain ended within 3 % of a gain measured at each step in three of four "
    "cells of a small task (8 and 32 times the batch), and 12 % higher in a run of 62 steps."
)
_SGD = (
    "With SGD, constant values of the mean gain ended 58 and 66 % higher than a gain measured at each step, on a small "
    "task at 32 and 8 times the batch. Near the largest stable learning rate they may diverge: a measured gain falls "
    "there, and a constant does not."
)


@dataclass(frozen=True)
class Recorded:
    """What a plan takes from a record."""

    optimizer: str  # a class of torch.optim
    base_batch: float  # examples
    groups: list[dict[str, Any]]  # values of each parameter group; one empty group if the optimizer is another one
    forecast: "Forecast"  # at the new batch
    noise_scale: float | None  # median over the run's last tenth, examples; `None` if unknown

    @property
    def gain(self) -> "Estimate":
        """The mean gain at the new batch."""
        return self.forecast.scales[0].gain

    @property
    def steps(self) -> "Estimate":
        """Optimizer steps of the whole run at the new batch."""
        return self.forecast.scales[0].steps


def recorded(record: str | PathLike[str], *, optimizer: str | None, base_batch: float | None, batch: float) -> Recorded:
    """Return the run's values and the forecast at `batch`.

    Raises:
        InvalidValueError: The record names no base batch or another one, names several optimizers or none, or has no
            variance.
    """
    from anybatch._forecast import forecast
    from anybatch._numbers import positive
    from anybatch._record import read_columns

    run = read_columns(record, ("variance", "sqnorm", "noise_scale", "skipped"))
    of_run = positive(run.config.get("base_batch"))
    if of_run is not None and base_batch is not None and of_run != base_batch:
        raise InvalidValueError(f"base-batch is {base_batch:g}, and {record} has {of_run:g}: leave the option out.")
    base = base_batch if of_run is None else of_run
    if base is None:
        raise InvalidValueError(f"base-batch is needed: {record} has none in its header.")
    named = run.config.get("optimizer")
    if optimizer is None and (not isinstance(named, str) or ", " in named):
        raise InvalidValueError(
            f"optimizer is needed: {record} has {named or 'none'} in its header. Plan one optimizer at a time, with "
            "its own values."
        )
    name = str(named) if optimizer is None else optimizer
    same = isinstance(named, str) and named.lower() == name.lower()
    return Recorded(
        optimizer=name,
        base_batch=base,
        groups=_groups(name, run.config.get("param_groups")) if same else [{}],
        forecast=forecast(record, [batch / base]),
        noise_scale=_noise_scale(run, base if of_run is None else 1.0),
    )


def how_good(optimizer: str) -> str:
    """Return how runs with static values compared with runs that measured the gain."""
    known = {"adamw": _ADAM, "sgd": _SGD}
    return known.get(optimizer.lower(), f"With {optimizer}, constant values of the mean gain were not measured.")


def _groups(optimizer: str, groups: object) -> list[dict[str, Any]]:
    """Return the values of each parameter group that the constructor of the optimizer takes."""
    import torch

    classes = {name.lower(): cls for name, cls in vars(torch.optim).items() if isinstance(cls, type)}
    cls = classes.get(optimizer.lower())
    known = set() if cls is None else {*signature(cls).parameters} & {*_VALUES}
    found = []
    for group in groups if isinstance(groups, list) else ():
        if not isinstance(group, dict):
            continue
        values = {name: value for name, value in group.items() if name in known}
        if "initial_lr" in group:  # a schedule may have changed lr before the run began, as a warm-up does
            values["lr"] = group["initial_lr"]
        if isinstance(values.get("betas"), list):
            values["betas"] = tuple(values["betas"])
        found.append(values)
    return found or [{}]


def _noise_scale(run: "Columns", unit: float) -> float | None:
    """Return the median noise scale over the last tenth of a run, in examples; `unit` is that of the record's."""
    from anybatch._numbers import median

    infinite = (run["variance"] > 0) & (run["sqnorm"] == 0)  # a record has no number for infinity
    noise = run["noise_scale"].masked_fill(infinite, inf)[run["skipped"] == 0]
    noise = noise[noise >= 0]
    return median(noise[-ceil(len(noise) / 10) :]) * unit if len(noise) else None
