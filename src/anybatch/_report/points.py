"""Points of a curve: which can be drawn, and few of them however long the run was."""

from collections.abc import Iterable
from math import log10

_HUGE, _TINY = 1e100, 1e-100  # beyond these nothing is drawn: a span of such values would overflow

Point = tuple[float, float]


def seen(value: float, *, log: bool = False) -> bool:
    """Whether a value has a place on an axis."""
    return _TINY < value < _HUGE if log else -_HUGE < value < _HUGE


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
