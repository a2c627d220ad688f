"""What counts as a number in what a user gives, or a file holds."""

from math import isfinite
from numbers import Real

from torch import Tensor

# Beyond it a float no longer counts one by one.
MOST = 2**53
_SHOWN = 120  # characters


def real(value: object) -> float | None:
    """`value` as a finite float; `None` for what is none: text, a bool, nan, infinity, an integer beyond all floats.

    A tensor of one element on a device counts as that element: some write their states so.
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
    """`value` as a positive, finite float; `None` for what is none."""
    number = real(value)
    return number if number is not None and number > 0 else None


def whole(value: object) -> int | None:
    """`value` as an integer, if it is one that a float counts exactly; `None` for what is none."""
    number = real(value)
    return int(number) if number is not None and number.is_integer() and abs(number) <= MOST else None


def chosen(values: Tensor, mask: Tensor) -> Tensor:
    """`values[mask]`, without a copy where that is all of them."""
    return values if mask.all() else values[mask]


def median(values: Tensor) -> float:
    """The median of one or more numbers of a vector; of an even number of them the mean of the middle two."""
    ordered, middle = values.sort().values, len(values) // 2
    high = ordered[middle].item()
    return high if len(values) % 2 else (ordered[middle - 1].item() + high) / 2


def shown(value: object) -> str:
    """`value` as an error shows it: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # Python writes no integer of more than 4300 digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
