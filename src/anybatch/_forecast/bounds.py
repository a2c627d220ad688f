"""Ranges of the numbers in records and arguments; within them the work is bounded and every result is finite."""

from collections.abc import Iterable, Mapping
from math import isnan
from typing import Any

import torch
from torch import Tensor

from anybatch._errors import InvalidValueError
from anybatch._numbers import chosen, positive, real, shown
from anybatch._record import Columns, StepRecord

_SCALE = (1e-12, 1e12)
_CLOCK = (1e-12, 1e15)  # base iterations; a longer sum of steps is not exact
SECONDS = (0.0, 1e12)
_MOMENT = (-1e100, 1e100)  # grad^2, far beyond float32; its square is still a float

_STEP = {
    "tau": _CLOCK,
    "iterations": (0.0, _CLOCK[1]),
    "scale": _SCALE,
    "raw_variance": _MOMENT,
    "raw_sqnorm": _MOMENT,
    "seconds": SECONDS,
}
_MAY_BE_UNKNOWN = ("raw_variance", "raw_sqnorm", "seconds")
_HEADER = {"total": _CLOCK, "ranks": (1.0, 1e9), "base_batch": (1e-12, 1e15), "noise_factor": (1e-12, 1e12)}
_SLACK = 1e-6  # relative rounding error of a long sum


def within(name: str, value: object, *, least: float, most: float) -> float:
    """Return an argument as a float, or raise InvalidValueError if it is not a number in the range."""
    number = real(value)
    if number is None or not least <= number <= most:
        raise InvalidValueError(f"{name} must be between {least:g} and {most:g}, got {shown(value)}.")
    return number


def scale_within(name: str, value: object) -> float:
    """Return a scale for which the numbers of steps and devices are finite."""
    return within(name, value, least=_SCALE[0], most=_SCALE[1])


def of_header(config: Mapping[str, Any], name: str, *, record: str) -> float | None:
    """Return a positive number of the header's configuration; `None` if it has none."""
    number = positive(config.get(name))
    return None if number is None else _possible(name, number, record=f"{record}, in its header")


FIELDS = tuple(_STEP)
Steps = Mapping[str, Tensor]  # the steps that moved the clock, as columns of float64


def moved(columns: Columns) -> Steps | None:
    """Return the steps that moved the clock; `None` if there is none or `walk` may reject one."""
    counted = columns["skipped"] == 0
    for name, (least, most) in _STEP.items():
        possible = (columns[name] >= least) & (columns[name] <= most)
        if name in _MAY_BE_UNKNOWN:
            possible |= columns[name].isnan()
        if not (possible | ~counted).all():
            return None
    tau, iterations = (chosen(columns[name], counted) for name in ("tau", "iterations"))
    if (iterations > tau * (1 + _SLACK)).any() or (tau[1:] < tau.cummax(0).values[:-1] * (1 - _SLACK)).any():
        return None
    on = counted & (columns["iterations"] > 0)
    return {name: chosen(columns[name], on) for name in FIELDS} if on.any() else None


def walk(steps: Iterable[object], *, record: str) -> Steps:
    """Validate each step of a whole run, in order, and return those that moved the clock.

    Raises:
        InvalidValueError: There is none, or a step is impossible; the message names `record`.
    """
    moved: list[StepRecord] = []
    for step in steps:
        if not isinstance(step, StepRecord) or step.skipped:
            continue
        where = f"{record}, in the line of step {shown(step.step)}"
        for name in _STEP:
            value = getattr(step, name)
            if not (name in _MAY_BE_UNKNOWN and isinstance(value, float) and isnan(value)):
                _possible(name, value, record=where)
        if step.iterations > step.tau * (1 + _SLACK):
            raise _damaged(where, f"iterations = {step.iterations:g} exceeds its sum, tau = {step.tau:g}")
        if moved and step.tau < moved[-1].tau * (1 - _SLACK):
            raise _damaged(where, f"tau = {step.tau:g} is less than in the step before it, {moved[-1].tau:g}")
        if step.iterations > 0:
            moved.append(step)
    if not moved:
        raise InvalidValueError(f"{record} has no step, so a forecast is not possible: record a run first.")
    return {name: torch.tensor([getattr(step, name) for step in moved], dtype=torch.float64) for name in FIELDS}


def _possible(name: str, value: object, *, record: str) -> float:
    least, most = (_STEP | _HEADER)[name]
    number = real(value)
    if number is None or not least <= number <= most:
        raise _damaged(record, f"{name} = {shown(value)} is not a number from {least:g} to {most:g}")
    return number


def _damaged(where: str, what: str) -> InvalidValueError:
    return InvalidValueError(
        f"{where}: {what}. Restore the record from a copy, or correct or delete this line: a forecast does not need "
        "every step."
    )
