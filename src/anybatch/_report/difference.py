"""How far runs are from those of scale 1 at equal tau: what curves that nearly fall on one another do not show."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean, stdev

from anybatch._report.chart import Chart, Line
from anybatch._report.points import Point, seen, value_at

SHARE = 0.25  # of the run is left out: there curves are so steep that a step sideways looks like one in height
_POINTS = 60
_LEAST = 3  # places of the clock from which there is something to draw

SAYS = (
    "Each curve less the mean of scale 1 at the same tau, from a quarter of the run on; before that the curves are so "
    "steep that one step sideways looks like a difference."
)
BAND = "The band is one standard deviation over the runs of a scale."


def difference(title: str, runs: Mapping[str, tuple[str, Sequence[Sequence[Point]]]], base: str) -> Chart:
    """The means of groups of runs less the mean of one group, against tau, each with its spread.

    At each tau, with y_i(tau) between a run's own points by linear interpolation and b(tau) the mean over the base
    group, a line is at mean_i y_i(tau) - b(tau); its band, where the group has two runs or more, reaches one standard
    deviation (n - 1) to each side.

    Args:
        title: what is compared.
        runs: for each group its name, its colour and the runs' points, in ascending tau.
        base: the name of the group that the others are compared with; it is drawn too, around 0.
    """
    curves = {name: [_drawable(points) for points in found] for name, (_, found) in runs.items()}
    curves = {name: kept for name, found in curves.items() if (kept := [each for each in found if len(each) > 1])}
    lines = []
    if base in curves:
        places = _places(max(points[-1][0] for points in curves[base]))
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


def _places(end: float) -> list[float]:
    return [end * (SHARE + (1 - SHARE) * i / _POINTS) for i in range(_POINTS + 1)]


def _drawable(points: Sequence[Point]) -> list[Point]:
    return sorted((x, y) for x, y in points if seen(x) and seen(y))


def _values(runs: Sequence[Sequence[Point]], tau: float) -> list[float]:
    """The runs' values at `tau`; of a run that has not come there, or begins later, none."""
    found = [value_at(points, tau) for points in runs if points[0][0] <= tau <= points[-1][0]]
    return [value for value in found if isfinite(value)]
