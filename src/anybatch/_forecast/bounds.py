"""What a record may say and a user ask: within these ranges the work is bounded, and every number stays a number."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from anybatch._errors import InvalidValueError
from anybatch._numbers import positive, real, shown
from anybatch._record import StepRecord

_SCALE = (1e-12, 1e12)
_CLOCK = (1e-12, 1e15)  # base iterations: a longer sum of steps is no longer exact
SECONDS = (0.0, 1e12)
# grad^2; its square is still a float, and what float32 can hold is far below.
_MOMENT = (-1e100, 1e100)

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
_SLACK = 1e-6  # of a long sum


def within(name: str, value: object, *, least: float, most: float) -> float:
    """An argument as a float, in a range.

    Raises:
        InvalidValueError: it is no number, or outside.
    """
    number = real(value)
    if number is None or not least <= number <= most:
        raise InvalidValueError(f"{name} must be between {least:g} and {most:g}, got {shown(value)}.")
    return number


def scale_within(name: str, value: object) -> float:
    """A scale whose numbers of steps and devices are still numbers."""
    return within(name, value, least=_SCALE[0], most=_SCALE[1])


def of_header(config: Mapping[str, Any], name: str, *, record: str) -> float | None:
    """A positive number of the header's configuration; `None` where it says none.

    Raises:
        InvalidValueError: it is one that no run has.
    """
    number = positive(config.get(name))
    return None if number is None else _possible(name, number, record=f"{record}, in its header")


def walk(steps: Sequence[StepRecord], *, record: str) -> list[StepRecord]:
    """The steps that moved the clock.

    Args:
        steps: of a whole run, in their order.
        record: its name, for errors.

    Raises:
        InvalidValueError: there is none, or one that no run has.
    """
    moved: list[StepRecord] = []
    for step in steps:
        if step.skipped:
            continue
        where = f"{record}, in the line of step {shown(step.step)}"
        for name in _STEP:
            value = getattr(step, name)
            if not (name in _MAY_BE_UNKNOWN and isinstance(value, float) and isnan(value)):
                _possible(name, value, record=where)
        if step.iterations > step.tau * (1 + _SLACK):
            raise _damaged(where, f"iterations = {step.iterations:g} is more than tau = {step.tau:g}, their sum")
        if moved and step.tau < moved[-1].tau * (1 - _SLACK):
            raise _damaged(where, f"tau = {step.tau:g} is less than in the step before it, {moved[-1].tau:g}")
        if step.iterations > 0:
            moved.append(step)
    if not moved:
        raise InvalidValueError(f"{record} holds no step, so there is nothing to forecast from.")
    return moved


def _possible(name: str, value: object, *, record: str) -> float:
    least, most = (_STEP | _HEADER)[name]
    number = real(value)
    if number is None or not least <= number <= most:
        raise _damaged(record, f"{name} = {shown(value)} is no number from {least:g} to {most:g}")
    return number


def _damaged(where: str, what: str) -> InvalidValueError:
    return InvalidValueError(
        f"{where}: {what}. Put the record back from a copy, or correct or delete this line: a forecast can do without "
        "single steps."
    )
