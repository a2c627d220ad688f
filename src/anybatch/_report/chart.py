"""A chart: lines over two axes as one SVG picture, in the colours of the page around it, light or dark."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from anybatch._report.page import inert

_WIDTH, _HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 432, 8, 230  # the frame
_HUGE, _TINY = 1e100, 1e-100  # beyond these nothing is drawn: a span of such values would overflow
_TICKS = 5
_AUTO_LOG = 30  # the ratio of the largest value to the smallest from which an axis is logarithmic

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line or dots.

    Args:
        points: pairs of x and y; where one is not finite, the line has a gap.
        name: shown where the pointer rests on it.
        colour: as in CSS.
        dash: SVG's dash array.
        dots: whether the points are drawn as dots in place of a line.
        band: for each x the low and the high end of a band behind the line.
    """

    points: Sequence[Point]
    name: str
    colour: str = "currentColor"
    dash: str = ""
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
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(_seen(x, log=self.log_x) and _seen(y) for line in self.lines for x, y in line.points)

    def html(self) -> str:
        """The figure; nothing where it is empty."""
        if self.empty:
            return ""
        points = [(x, y) for line in self.lines for x, y in _extent(line) if _seen(x, log=self.log_x) and _seen(y)]
        ys = [y for _, y in points]
        log_y = self.log_y or (min(ys) > 0 and max(ys) / min(ys) > _AUTO_LOG)
        ys = [y for y in ys if _seen(y, log=log_y)]
        if not ys:
            return ""
        across = _Axis.of([x for x, _ in points], log=self.log_x, start=_LEFT, end=_RIGHT, margin=0.01)
        up = _Axis.of(ys, log=log_y, start=_BOTTOM, end=_TOP, margin=0.04)
        title = inert(self.title)
        lines = "".join(_line(line, across, up) for line in self.lines)
        return (
            f"<figure><figcaption>{title}</figcaption>"
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title} against {inert(self.across)}" '
            f'font-size="12" fill="none">{"".join(_frame(across, up, self.across))}{lines}</svg></figure>'
        )


@dataclass(frozen=True)
class Legend:
    """What the lines of charts mean: their name, colour and dash each, and a word on what is left out."""

    entries: Sequence[tuple[str, str, str]]
    more: str = ""

    def html(self) -> str:
        items = "".join(
            f'<li><svg viewBox="0 0 26 11" aria-hidden="true"><path d="M0,6H26" stroke="{inert(colour)}" '
            f'stroke-width="2.5" stroke-dasharray="{inert(dash)}"/></svg>{inert(name)}</li>'
            for name, colour, dash in self.entries
        )
        return f'<ul class="legend">{items}{f"<li>{inert(self.more)}</li>" if self.more else ""}</ul>'


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], *, log: bool, start: float, end: float, margin: float) -> "_Axis":
        """An axis that shows all of the values."""
        low, high = (log10(v) if log else v for v in (min(values), max(values)))
        if high - low <= 1e-9 * max(abs(low), abs(high), 1.0 if log else _TINY):  # one value: give it room
            room = 0.3 if log else 0.1 * abs(low) if abs(low) > _TINY else 1.0
        else:
            room = margin * (high - low)
        return cls(low - room, high + room, log, start, end)

    def at(self, value: float) -> float:
        """Where a value lies."""
        value = log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values to be written at the axis."""
        if not self.log:
            return _round(self.low, self.high)
        decades = range(ceil(self.low), floor(self.high) + 1)
        if len(decades) > 2:
            return [10.0**e for e in decades[:: ceil(len(decades) / _TICKS)]]
        fine = [m * 10.0**e for e in range(floor(self.low), ceil(self.high) + 1) for m in (1, 2, 5)]
        fine = [v for v in fine if self.low <= log10(v) <= self.high]
        return fine if len(fine) > 1 else [v for v in _round(10**self.low, 10**self.high) if v > 0]


def short_number(value: float) -> str:
    """A number as an axis or a table has it: 12500 is 12.5k."""
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if max(unit, 1e4) <= size < 1e15:
            return f"{value / unit:.4g}{letter}"
    text = f"{value:.4g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def thin(points: Iterable[Point], *, columns: int = 160, log: bool = False) -> list[Point]:
    """At most two points for each column of pixels, the lowest and the highest; a gap stays one."""
    given = [(x, y) for x, y in points if _seen(x, log=log)]
    if len(given) <= 2 * columns:
        return given
    xs = [log10(x) if log else x for x, _ in given]
    low, span = min(xs), max(xs) - min(xs)
    bins: dict[int, list[Point]] = {}
    for x, point in zip(xs, given, strict=True):
        bins.setdefault(int((x - low) / span * columns) if span else 0, []).append(point)
    kept: list[Point] = []
    for key in sorted(bins):
        seen = [point for point in bins[key] if _seen(point[1])]
        if not seen:
            kept.append(bins[key][0])
            continue
        ends = {min(seen, key=lambda p: p[1]), max(seen, key=lambda p: p[1])}
        kept.extend(point for point in dict.fromkeys(seen) if point in ends)
    return kept


def _seen(value: float, *, log: bool = False) -> bool:
    return _TINY < value < _HUGE if log else -_HUGE < value < _HUGE


def _extent(line: Line) -> Iterator[Point]:
    yield from line.points
    for x, low, high in line.band:
        yield x, low
        yield x, high


def _round(low: float, high: float) -> list[float]:
    least = (high - low) / _TICKS
    power = 10.0 ** floor(log10(least))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= least)
    return [k * step for k in range(ceil(low / step), floor(high / step) + 1)]


def _frame(across: _Axis, up: _Axis, label: str) -> Iterator[str]:
    for value in up.ticks():
        y = up.at(value)
        yield f'<path d="M{_LEFT},{y:.1f}H{_RIGHT}" stroke="var(--line)"/>'
        yield _text(short_number(value), _LEFT - 6, y + 4, "end")
    for value in across.ticks():
        x = across.at(value)
        yield f'<path d="M{x:.1f},{_BOTTOM}v4" stroke="var(--soft)"/>'
        yield _text(short_number(value), x, _BOTTOM + 17, "middle")
    yield f'<path d="M{_LEFT},{_BOTTOM}H{_RIGHT}" stroke="var(--soft)"/>'
    yield _text(inert(label), (_LEFT + _RIGHT) / 2, _HEIGHT - 5, "middle")


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var(--soft)">{text}</text>'


def _line(line: Line, across: _Axis, up: _Axis) -> str:
    pieces: list[list[str]] = [[]]
    for x, y in line.points:
        if _seen(x, log=across.log) and _seen(y, log=up.log):
            pieces[-1].append(f"{across.at(x):.1f},{up.at(y):.1f}")
        elif pieces[-1]:
            pieces.append([])
    pieces = [piece for piece in pieces if piece]
    if not pieces:
        return ""
    if line.dots:
        shape = "".join(
            f'<circle cx="{x}" cy="{y}" r="4.5"/>' for x, y in (p.split(",") for piece in pieces for p in piece)
        )
        drawn = f'<g fill="{inert(line.colour)}">{shape}'
    else:  # a piece of one point is a round cap of no length
        path = "".join(f"M{'L'.join(piece)}" if len(piece) > 1 else f"M{piece[0]}h0" for piece in pieces)
        drawn = (
            f'<g stroke="{inert(line.colour)}" stroke-width="1.7" stroke-linejoin="round" stroke-linecap="round">'
            f'<path d="{path}" stroke-dasharray="{inert(line.dash)}"/>'
        )
    return f"{_band(line, across, up)}{drawn}<title>{inert(line.name)}</title></g>"


def _band(line: Line, across: _Axis, up: _Axis) -> str:
    ends = [
        (across.at(x), up.at(low), up.at(high))
        for x, low, high in line.band
        if _seen(x, log=across.log) and _seen(low, log=up.log) and _seen(high, log=up.log)
    ]
    if not ends:
        return ""
    around = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y in around)
    return f'<path d="M{path}Z" fill="{inert(line.colour)}" fill-opacity=".16"/>'
