"""Charts of a page: lines over two axes, with a legend and with values under the pointer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import nan
from typing import TYPE_CHECKING

from anybatch._report.figure import INK, blank, css, inline, numbers, project_style, widest
from anybatch._report.page import inert, visible
from anybatch._report.points import Point, seen
from anybatch._report.words import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 380, 236
_LEAST_LEFT = 0.12  # share of the width for the vertical axis's numbers; more for long ones
_GAP = 6  # pixels between these numbers and the edge
_ALONE = 4.5  # pixels of a point without a line, such as a single evaluation
_AUTO_LOG = 30  # an axis is logarithmic above this ratio of the largest to the smallest value
_STRIPS = 32  # vertical strips of the chart, each with the values under the pointer
_NAMED = 12  # lines whose values a strip shows

Dash = tuple[float, ...]  # alternating lengths of dashes and gaps; empty for a solid line


@dataclass(frozen=True)
class Line:
    """A line or dots."""

    points: Sequence[Point]  # pairs of x and y; a non-finite y is a gap
    name: str  # shown under the pointer
    colour: str = INK  # as `#rrggbb`
    dash: Dash = ()  # lengths of dashes and gaps
    dots: bool = False  # whether to draw dots instead of a line
    band: Sequence[tuple[float, float, float]] = ()  # for each x the low and the high end of a band behind the line


@dataclass(frozen=True)
class Chart:
    """Lines over two axes; the vertical axis is logarithmic if its values are positive and far apart."""

    title: str  # the quantity on the vertical axis
    across: str  # the quantity on the horizontal axis
    lines: Sequence[Line]  # lines without a point that can be drawn are dropped
    log_x: bool = False  # whether the horizontal axis is logarithmic
    log_y: bool = False  # whether the vertical axis is logarithmic for all values

    @property
    def height(self) -> int:
        """The picture's height in pixels."""
        return HEIGHT

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self._settled().lines

    def html(self) -> str:
        """The figure with its title; empty if there is nothing to draw."""
        drawn = self.svg()
        return f"<figure><figcaption>{inert(self.title)}</figcaption>{drawn}</figure>" if drawn else ""

    def svg(self) -> str:
        """The picture without its title, `WIDTH` by `HEIGHT`; empty if there is nothing to draw."""
        chart = self._settled()
        if not chart.lines:
            return ""
        with project_style():
            figure, [axes] = blank(width=WIDTH, height=HEIGHT)
            figure.subplots_adjust(left=_LEAST_LEFT, right=0.985, top=0.97, bottom=0.18)
            chart.draw(axes)
            figure.subplots_adjust(left=max(_LEAST_LEFT, (widest(axes.yaxis) + _GAP) / WIDTH))
            titles = {f"line{i}": _last(line, self.across) for i, line in enumerate(chart.lines)}
            titles |= {f"strip{i}": words for i, words in enumerate(_strips(axes, chart))}
            return inline(figure, f"{self.title} against {self.across}", titles)

    def draw(self, axes: "Axes") -> None:
        """Draw on axes of matplotlib, within `project_style()`."""
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
        """The lines' last values with `low <= x < high`, the highest first; empty if there are none."""
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
        """The same chart with `log_y` decided, nan for the points that cannot be drawn, and no empty line."""
        points = [point for line in self.lines for point in line.points]
        points += [(x, y) for line in self.lines for x, *ends in line.band for y in ends]
        ys = [y for x, y in points if seen(x, log=self.log_x) and seen(y)]
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
    """The legend of charts: a name, colour and dash for each line, and a note."""

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
    dash = (0, line.dash) if line.dash else "-"
    style = {"ls": "", "ms": 8} if line.dots else {"ls": dash, "ms": _ALONE, "markevery": alone}
    axes.plot(xs, ys, color=line.colour, marker="o", mew=0, clip_on=False, gid=gid, **style)


def _last(line: Line, across: str) -> str:
    x, y = next(point for point in reversed(line.points) if seen(point[1]))
    return f"{line.name}\n{short_number(y)} at {across} {short_number(x)}"


def _strips(axes: "Axes", chart: Chart) -> list[str]:
    """Divide the axes into strips around the points; returns the strips' tooltips."""
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
