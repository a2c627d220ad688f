"""Points of a curve: which of them can be drawn, and a selection of bounded size."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import inf, log10
from typing import TypeVar

import torch
from torch import Tensor

from anybatch._numbers import chosen

_HUGE, _TINY = 1e100, 1e-100  # outside of these nothing is drawn: a difference of such values would overflow
_PART = 65536  # numbers that are processed together; copies of whole columns would dominate the memory

T = TypeVar("T")
Point = tuple[float, float]


def seen(value: float, *, log: bool = False) -> bool:
    """Whether a value can be drawn."""
    return _TINY < value < _HUGE if log else -_HUGE < value < _HUGE


def value_at(points: Sequence[Point], x: float) -> float:
    """Linear interpolation of the points, in ascending x, at `x`; constant beyond the ends."""
    i = bisect_left(points, x, key=lambda point: point[0])
    if i in (0, len(points)):
        return points[min(i, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)


def drawable(values: Tensor, *, log: bool = False) -> Tensor:
    """`seen` of each value."""
    return (values > (_TINY if log else -_HUGE)) & (values < _HUGE)


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most `most` of the values, evenly spread, with both ends."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def each(values: Tensor) -> Iterator[float]:
    """Iterate over the numbers of a vector."""
    for part in values.split(_PART):
        yield from part.tolist()


def thin(x: Tensor, y: Tensor, *, columns: int = 160, log: bool = False) -> list[Point]:
    """The lowest and the highest point of each column of pixels, and the first point of each gap."""
    placed = drawable(x, log=log)
    if int(placed.sum()) <= 2 * columns:
        return list(zip(x[placed].tolist(), y[placed].tolist(), strict=True))
    scale = _log10 if log else torch.clone
    low, high = scale(torch.stack(chosen(x, placed).aminmax())).tolist()
    parts = []
    for shown, *part in zip(placed.split(_PART), x.split(_PART), y.split(_PART), strict=True):
        xs, ys = (values[shown] for values in part)
        column = ((scale(xs) - low) / ((high - low) or 1.0) * columns).long()
        kept = _ends(column, ys, columns)
        parts.append((column[kept], xs[kept], ys[kept]))
    column, x, y = map(torch.cat, zip(*parts, strict=True))
    kept = _ends(column, y, columns)
    return list(zip(x[kept].tolist(), y[kept].tolist(), strict=True))


def _ends(column: Tensor, y: Tensor, columns: int) -> Tensor:
    """The indices of each column's lowest and highest point, in order, and of the first point of a gap.

    Applied to the parts of a curve and then to the remaining points, it gives the indices for the whole curve.
    """
    places, drawn = torch.arange(len(y)), drawable(y)

    def first(chosen: Tensor) -> Tensor:
        """The first chosen index of each column; `len(y)` if there is none."""
        found = torch.full((columns + 1,), len(y))
        return found.scatter_reduce_(0, column[chosen], places[chosen], "amin")

    def lowest(values: Tensor) -> Tensor:
        least = torch.full((columns + 1,), inf, dtype=torch.float64).scatter_reduce_(0, column, values, "amin")
        return first(drawn & (values == least[column]))

    one, other = lowest(y.where(drawn, inf)), lowest((-y).where(drawn, inf))
    gap = first(~drawn).where(one == len(y), len(y))
    kept = torch.stack([torch.minimum(one, other), torch.maximum(one, other), gap], 1).flatten()
    unique: Tensor = kept[kept < len(y)].unique_consecutive()
    return unique


def _log10(x: Tensor) -> Tensor:
    """`math.log10` of each number, since the last digit decides which column a point at an edge is in."""
    return torch.tensor([log10(each) for each in x.tolist()], dtype=torch.float64)
