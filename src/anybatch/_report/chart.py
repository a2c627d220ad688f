"""Charts of a page: lines over two axes, what they mean, and what they come to under the pointer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import nan
from typing import TYPE_CHECKING

from anybatch._report.figure import INK, blank, css, house, inline, numbers, widest
from anybatch._report.page import inert, visible
from anybatch._report.points import Point, seen
from anybatch._report.words import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 380, 236
_LEAST_LEFT = 0.12  # of the width, for the numbers upwards; more where they are long
_GAP = 6  # pixels between them and the edge
_ALONE = 4.5  # pixels of a point that no line leads to: one evaluation must be seen
_AUTO_LOG = 30  # the ratio of the largest value to the smallest from which an axis is logarithmic
_STRIPS = 32  # of the chart from left to right, each of which shows its values under the pointer
_NAMED = 12  # lines whose values a strip shows

Dash = tuple[float, ...]  # lengths of dashes and gaps by turns; none: a whole line


@dataclass(frozen=True)
class Line:
    """A line or dots.

    Args:
        points: pairs of x and y; where one is not finite, the line has a gap.
        name: shown where the pointer rests on it.
        colour: as `#rrggbb`.
        dash: how it is broken.
        dots: whether the points are drawn as dots in place of a line.
        band: for each x the low and the high end of a band behind the line.
    """

    points: Sequence[Point]
    name: str
    colour: str = INK
    dash: Dash = ()
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over two axes; the vertical one is logarithmic where its values are positive and far apart.

    Args:
        title: what is drawn upwards.
        across: what is drawn to the right.
        lines: the lines; one without a point that can be drawn is left out.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical one is, whatever its values.
    """

    title: str
    across: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False

    @property
    def height(self) -> int:
        """Of the picture, in pixels."""
        return HEIGHT

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self._settled().lines

    def html(self) -> str:
        """The figure; nothing where it is empty."""
        drawn = self.svg()
        return f"<figure><figcaption>{inert(self.title)}</figcaption>{drawn}</figure>" if drawn else ""

    def svg(self) -> str:
        """The picture alone, `WIDTH` by `HEIGHT`; nothing where it is empty."""
        chart = self._settled()
        if not chart.lines:
            return ""
        with house():
            figure, [axes] = blank(width=WIDTH, height=HEIGHT)
            figure.subplots_adjust(left=_LEAST_LEFT, right=0.985, top=0.97, bottom=0.18)
            chart.draw(axes)
            figure.subplots_adjust(left=max(_LEAST_LEFT, (widest(axes.yaxis) + _GAP) / WIDTH))
            titles = {f"line{i}": _last(line, self.across) for i, line in enumerate(chart.lines)}
            titles |= {f"strip{i}": words for i, words in enumerate(_strips(axes, chart))}
            return inline(figure, f"{self.title} against {self.across}", titles)

    def draw(self, axes: "Axes") -> None:
        """Draw on axes of matplotlib, within `house()`."""
        chart = self._settled()
        axes.set(xscale="log" if chart.log_x else "linear", yscale="log" if chart.log_y else "linear")
        axes.set_xlabel(visible(self.across))
        axes.margins(0.01, 0.04)
        for i, line in enumerate(chart.lines):
            _draw(axes, line, f"line{i}")
        axes.autoscale_view()
        axes.autoscale(enable=False)
        numbers(axes.xaxis, log=chart.log_x)
        numbers(axes.yaxis, log=chart.log_y)

    def values(self, low: float, high: float) -> str:
        """The lines' last values between two places, the highest first, as in the picture; nothing without any."""
        found = []
        for line in self.lines:
            inside = [(x, y) for x, y in line.points if low <= x < high and seen(y)]
            found += [(*inside[-1], line.name)] if inside else []
        if not found:
            return ""
        named = [f"{name}: {short_number(y)}" for _, y, name in sorted(found, key=lambda each: -each[1])[:_NAMED]]
        more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
        ends = dict.fromkeys(short_number(end([x for x, _, _ in found])) for end in (min, max))
        return "\n".join([f"{self.across} {' to '.join(ends)}", *named, *more])

    def _settled(self) -> "Chart":
        """The same chart with its scales decided, the points that cannot be drawn as nan, and no empty line."""
        ys = [y for line in self.lines for x, y in _extent(line) if seen(x, log=self.log_x) and seen(y)]
        log_y = self.log_y or (bool(ys) and min(ys) > 0 and max(ys) / min(ys) > _AUTO_LOG)
        lines = []
        for line in self.lines:
            points = [(x, y if seen(y, log=log_y) else nan) for x, y in line.points if seen(x, log=self.log_x)]
            band = [
                (x, low, high)
                for x, low, high in line.band
                if seen(x, log=self.log_x) and seen(low, log=log_y) and seen(high, log=log_y)
            ]
            if any(seen(y) for _, y in points):
                lines.append(replace(line, points=points, band=band))
        return replace(self, lines=lines, log_y=log_y)


@dataclass(frozen=True)
class Legend:
    """What the lines of charts mean: their name, colour and dash each, and a word on what is left out."""

    entries: Sequence[tuple[str, str, Dash]]
    more: str = ""

    def html(self) -> str:
        items = "".join(
            f'<li><svg viewBox="0 0 26 11" aria-hidden="true"><path d="M0,6H26" stroke="{inert(css(colour))}" '
            f'stroke-width="2.5" stroke-dasharray="{" ".join(map(str, dash))}"/></svg>{inert(name)}</li>'
            for name, colour, dash in self.entries
        )
        return f'<ul class="legend">{items}{f"<li>{inert(self.more)}</li>" if self.more else ""}</ul>'


def _draw(axes: "Axes", line: Line, gid: str) -> None:
    if line.band:
        xs, low, high = zip(*line.band, strict=True)
        axes.fill_between(xs, low, high, color=line.colour, alpha=0.16, lw=0, clip_on=False, zorder=1)
    xs, ys = zip(*line.points, strict=True)
    drawn = [False, *map(seen, ys), False]
    alone = [i for i in range(len(ys)) if drawn[i + 1] and not drawn[i] and not drawn[i + 2]]
    style = {"ls": "", "ms": 8} if line.dots else {"ls": _style(line.dash), "ms": _ALONE, "markevery": alone}
    axes.plot(xs, ys, color=line.colour, marker="o", mew=0, clip_on=False, gid=gid, **style)


def _style(dash: Dash) -> str | tuple[int, Dash]:
    return (0, dash) if dash else "-"


def _last(line: Line, across: str) -> str:
    x, y = next(point for point in reversed(line.points) if seen(point[1]))
    return f"{line.name}\n{short_number(y)} at {across} {short_number(x)}"


def _strips(axes: "Axes", chart: Chart) -> list[str]:
    """Cut the axes into strips, each to the middle between its own points and the next; returns their values."""
    from matplotlib.patches import Rectangle

    to_data = axes.transAxes + axes.transData.inverted()
    edges = [float(to_data.transform((i / _STRIPS, 0))[0]) for i in range(_STRIPS + 1)]
    found = {i: words for i, (low, high) in enumerate(pairwise(edges)) if (words := chart.values(low, high))}
    cuts = [0.0, *((a + b + 1) / 2 / _STRIPS for a, b in pairwise(found)), 1.0]
    for i, (low, high) in enumerate(pairwise(cuts)):
        strip = Rectangle((low, 0), high - low, 1, transform=axes.transAxes, fc="none", lw=0, zorder=1.5, clip_on=False)
        strip.set_gid(f"strip{i}")
        axes.add_artist(strip)
    return list(found.values())


def _extent(line: Line) -> Iterator[Point]:
    yield from line.points
    for x, low, high in line.band:
        yield x, low
        yield x, high
