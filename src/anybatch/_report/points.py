"""Points of a curve: which can be drawn, and few of them however long the run was."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from math import log10

_HUGE, _TINY = 1e100, 1e-100  # beyond these nothing is drawn: a span of such values would overflow

Point = tuple[float, float]


def seen(value: float, *, log: bool = False) -> bool:
    """Whether a value has a place on an axis."""
    return _TINY < value < _HUGE if log else -_HUGE < value < _HUGE


def value_at(points: Sequence[Point], x: float) -> float:
    """Linear interpolation of the points, in ascending x, at `x`; the ends are held."""
    i = bisect_left(points, x, key=lambda point: point[0])
    if i in (0, len(points)):
        return points[min(i, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)


def thin(points: Iterable[Point], *, columns: int = 160, log: bool = False) -> list[Point]:
    """At most two points for each column of pixels, the lowest and the highest; a gap stays one."""
    given = [(x, y) for x, y in points if seen(x, log=log)]
    if len(given) <= 2 * columns:
        return given
    xs = [log10(x) if log else x for x, _ in given]
    low, span = min(xs), max(xs) - min(xs)
    bins: dict[int, list[Point]] = {}
    for x, point in zip(xs, given, strict=True):
        bins.setdefault(int((x - low) / span * columns) if span else 0, []).append(point)
    kept: list[Point] = []
    for key in sorted(bins):
        drawn = [point for point in bins[key] if seen(point[1])]
        if not drawn:
            kept.append(bins[key][0])
            continue
        ends = {min(drawn, key=lambda p: p[1]), max(drawn, key=lambda p: p[1])}
        kept.extend(point for point in dict.fromkeys(drawn) if point in ends)
    return kept
