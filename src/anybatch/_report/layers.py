"""The noise of layers against tau: a row for each layer, with its noise scale as colour."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10, nan
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from anybatch._record import StepRecord
from anybatch._report.chart import WIDTH, Legend
from anybatch._report.figure import blank, colour, inline, numbers, project_style, widest
from anybatch._report.page import inert, visible
from anybatch._report.points import seen
from anybatch._report.words import short_number
from anybatch._scaling import Moments

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROWS, _ROW = 460, 15  # pixels: the most for all rows, and the most for one row
_FOOT = 42  # pixels for the numbers below
_LETTERS, _SIZE, _LINE = 22, 10.0, 13  # a layer's name: most letters, size, and pixels from one to the next
_MOST = 230  # layers; two pixels each
_WINDOWS = 24  # windows of tau; a cell is one or several
_SURE = 2.0  # standard errors of a cell's sqnorm above 0; its noise scale is then known to a factor
_COLOURS = 9  # with more colours, neighbours are too similar
# The ratio between a colour's limits: equal parts of a decade, or several decades.
_SPANS = (10**0.05, 10**0.1, 10**0.2, 10 ** (1 / 3), 10**0.5, *(10.0 ** (2**i) for i in range(8)))


@dataclass(frozen=True)
class Cell:
    """The noise scale of a layer between two values of tau."""

    begin: float
    end: float
    noise: float


@dataclass(frozen=True)
class LayerMap:
    """The noise scale of each layer along tau."""

    layers: Mapping[str, Sequence[Cell]]  # cells in ascending tau, with gaps, in the model's order
    end: float  # tau at the end of the run, base iterations


def layer_map(steps: Sequence[StepRecord], *, unit: float) -> LayerMap | None:
    """The map of a run's steps, in base batches times `unit`; `None` if no step was measured by layer.

    A cell grows by a twenty-fourth of the run until the mean sqnorm of its steps is two standard errors above 0. Cells
    are long where the noise is large, and absent where the steps do not determine it.
    """
    measured = [step for step in steps if step.per_layer and seen(step.tau, log=True)]
    if not measured:
        return None
    end = max(step.tau for step in measured)
    windows: list[list[Mapping[str, Moments]]] = [[] for _ in range(_WINDOWS)]
    for step in measured:
        windows[min(max(ceil(step.tau / end * _WINDOWS), 1), _WINDOWS) - 1].append(step.per_layer)
    edges = [end * i / _WINDOWS for i in range(_WINDOWS + 1)]
    names = list(dict.fromkeys(name for step in measured for name in step.per_layer))[:_MOST]
    return LayerMap({name: list(_grown(name, windows, edges, unit)) for name in names}, end)


def _grown(
    name: str, windows: Sequence[Sequence[Mapping[str, Moments]]], edges: Sequence[float], unit: float
) -> Iterator[Cell]:
    begin, held = edges[0], list[Moments]()
    for window, edge in zip(windows, edges[1:], strict=True):
        held += [layers[name] for layers in window if name in layers and layers[name].finite]
        noise = _noise(held) * unit
        if seen(noise, log=True):
            yield Cell(begin, edge, noise)
            begin, held = edge, []


def _noise(measured: Sequence[Moments]) -> float:
    """The noise scale in base batches; nan if these measurements do not determine it."""
    if len(measured) < 2 or not all(seen(m.variance) and seen(m.sqnorm) for m in measured):
        return nan
    sqnorms = [m.sqnorm for m in measured]
    if fmean(sqnorms) <= _SURE * stdev(sqnorms) / len(measured) ** 0.5:
        return nan
    return Moments(fmean(m.variance for m in measured), fmean(sqnorms)).noise_scale


def levels(maps: Iterable[LayerMap]) -> list[float]:
    """The limits of the colours, in ascending order; none without a cell."""
    known = [cell.noise for each in maps for cells in each.layers.values() for cell in cells]
    for span in _SPANS if known else ():
        low, high = (floor(log10(end) / log10(span)) for end in (min(known), max(known)))
        if high - low < _COLOURS:
            return [span**i for i in range(low, high + 2)]
    return []


def layer_legend(limits: Sequence[float]) -> Legend:
    """The legend of the colours."""
    words = [short_number(float(f"{limit:.2g}")) for limit in limits]
    pairs = list(enumerate(pairwise(words)))
    return Legend([(f"{a} to {b}", colour(place, len(pairs)), ()) for place, (a, b) in pairs])


@dataclass(frozen=True)
class LayerChart:
    """The picture of a map."""

    title: str  # the run's name
    found: LayerMap
    limits: Sequence[float]  # the limits of the colours, from `levels`

    @property
    def height(self) -> int:
        """The picture's height in pixels."""
        return self._tall + _FOOT

    @property
    def _tall(self) -> int:
        rows = len(self.found.layers)
        return min(_ROW * rows, max(_ROWS, 2 * rows))

    def html(self) -> str:
        """The figure."""
        return f"<figure><figcaption>{inert(self.title)}</figcaption>{self.svg()}</figure>"

    def svg(self) -> str:
        """The picture without its title."""
        with project_style():
            figure, [axes] = blank(width=WIDTH, height=self.height)
            figure.subplots_adjust(right=0.985, top=1.0, bottom=_FOOT / self.height)
            _frame(axes, self.found, every=ceil(_LINE * len(self.found.layers) / self._tall))
            figure.subplots_adjust(left=(widest(axes.yaxis) + 6) / WIDTH)
            many = len(self.limits) - 1
            for place in range(many):
                _paint(axes, list(_cells(self.found, self.limits, place)), colour(place, many))
            return inline(figure, f"{self.title}: noise scale of each layer against tau", _titles(axes, self.found))


def _frame(axes: "Axes", found: LayerMap, *, every: int) -> None:
    """Set up axes with the name of each `every`-th layer."""
    names = list(found.layers)
    shown = range(0, len(names), every)
    axes.set(xlim=(0, found.end), ylim=(len(names), 0))
    axes.set_xlabel("tau (base iterations)")
    axes.grid(visible=False)
    # Long names share their beginnings, so the end is shown.
    ends = [name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}" for name in names]
    axes.set_yticks([i + 0.5 for i in shown], [visible(ends[i]) for i in shown])
    axes.tick_params(axis="y", labelsize=_SIZE)
    numbers(axes.xaxis, log=False)


def _cells(found: LayerMap, limits: Sequence[float], place: int) -> Iterator[tuple[Cell, int]]:
    """The cells of the colour at index `place`, with their rows."""
    for row, cells in enumerate(found.layers.values()):
        yield from ((cell, row) for cell in cells if sum(cell.noise >= limit for limit in limits[1:-1]) == place)


def _paint(axes: "Axes", cells: Sequence[tuple[Cell, int]], fill: str) -> None:
    """Draw all cells of a colour as one path, which keeps a figure of thousands of cells small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    points = []
    for cell, row in cells:
        low, high = row + 0.04, row + 0.96
        points += [(cell.begin, low), (cell.end, low), (cell.end, high), (cell.begin, high), (cell.begin, low)]
    if points:
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(cells)
        axes.add_artist(PathPatch(Path(points, codes), fc=fill, lw=0, clip_on=False))


def _titles(axes: "Axes", found: LayerMap) -> dict[str, str]:
    """Add an invisible row over each layer; returns the rows' tooltips."""
    from matplotlib.patches import Rectangle

    titles = {}
    for i, (name, cells) in enumerate(found.layers.items()):
        row = Rectangle((0, i), found.end, 1, fc="none", lw=0, zorder=3, clip_on=False)
        row.set_gid(f"row{i}")
        axes.add_artist(row)
        ends = dict.fromkeys([*cells[:1], *cells[-1:]])
        words = [f"{short_number(c.noise, 3)} for tau {short_number(c.begin)} to {short_number(c.end)}" for c in ends]
        titles[f"row{i}"] = "\n".join([name, *(words or ["not known"])])
    return titles
