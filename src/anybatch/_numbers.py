"""Numbers from arguments and files."""

from math import isfinite
from numbers import Real

from torch import Tensor

MOST = 2**53  # the largest integer up to which a float counts one by one
_SHOWN = 120  # characters


def real(value: object) -> float | None:
    """`value` as a finite float; `None` for text, a bool, nan, infinity and an integer beyond all floats.

    A tensor of one element, on any device, counts as the element: some states hold these tensors.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if isfinite(number) else None


def positive(value: object) -> float | None:
    """`value` as a positive, finite float; `None` for anything else."""
    number = real(value)
    return number if number is not None and number > 0 else None


def whole(value: object) -> int | None:
    """`value` as an integer that a float represents exactly; `None` for anything else."""
    number = real(value)
    return int(number) if number is not None and number.is_integer() and abs(number) <= MOST else None


def chosen(values: Tensor, mask: Tensor) -> Tensor:
    """`values[mask]`, without a copy where the mask is all true."""
    return values if mask.all() else values[mask]


def median(values: Tensor) -> float:
    """The median of a vector; with an even number of entries, the mean of the middle two."""
    ordered, middle = values.sort().values, len(values) // 2
    high = ordered[middle].item()
    return high if len(values) % 2 else (ordered[middle - 1].item() + high) / 2


def shown(value: object) -> str:
    """`value` as a short text for an error."""
    try:
        text = repr(value)
    except Exception:  # such as Python's, for integers of more than 4300 digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
