"""The difference of runs from scale 1 at equal tau, which nearly equal curves do not show."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean, stdev

from anybatch._report.chart import Chart, Line
from anybatch._report.points import Point, seen, value_at

_SHARE = 0.25  # share of the run that is left out: steep curves turn a shift of one step into a large difference
_POINTS = 60
_LEAST = 3  # fewest points of a drawn line

METHOD = (
    "Each curve minus the mean of scale 1 at the same tau, after the first quarter of the run. Before that the curves "
    "are so steep that a shift of one step looks like a difference."
)
BAND = "The band is one standard deviation over the runs of a scale."


def difference(title: str, runs: Mapping[str, tuple[str, Sequence[Sequence[Point]]]], base: str) -> Chart:
    """The mean of each group of runs minus the mean of the base group, against tau.

    y_i(tau) is linearly interpolated between a run's own points, and b(tau) is the mean over the base group. The line
    is mean_i y_i(tau) - b(tau). For two runs or more its band is one standard deviation (n - 1) to each side. `runs`
    has each group's colour and its runs' points in ascending tau, by the group's name; `base` is drawn too, around 0.
    """
    curves = {}
    for name, (_, found) in runs.items():
        drawn = [sorted((x, y) for x, y in points if seen(x) and seen(y)) for points in found]
        if kept := [points for points in drawn if len(points) > 1]:
            curves[name] = kept
    lines = []
    if base in curves:
        end = max(points[-1][0] for points in curves[base])
        places = [end * (_SHARE + (1 - _SHARE) * i / _POINTS) for i in range(_POINTS + 1)]
        own = {tau: fmean(values) for tau in places if (values := _values(curves[base], tau))}
        for name, found in curves.items():
            line, band = [], []
            for tau, zero in own.items():
                values = [value - zero for value in _values(found, tau)]
                if values:
                    line.append((tau, fmean(values)))
                if len(values) > 1:
                    band.append((tau, fmean(values) - stdev(values), fmean(values) + stdev(values)))
            if len(line) >= _LEAST:
                lines.append(Line(line, name, runs[name][0], band=band))
    return Chart(title, "tau (base iterations)", lines if len(lines) > 1 else [])


def _values(runs: Sequence[Sequence[Point]], tau: float) -> list[float]:
    """The values at `tau` of the runs whose points include it."""
    found = [value_at(points, tau) for points in runs if points[0][0] <= tau <= points[-1][0]]
    return [value for value in found if isfinite(value)]
