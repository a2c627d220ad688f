"""The one room where pictures are drawn: matplotlib in the project's style, as a file or as SVG inside of a page.

Matplotlib draws all of them, for it is there already, keeps a page small and free of scripts, and makes the PNG files
for the docs by the same code. Plotly, Bokeh and Vega-Lite have livelier tooltips, but bring 0.9 to 4.8 MB of script to
each page, which then shows nothing where scripts are off, as in a mail; pygal's page is larger still and has no bands.
What matplotlib does not know, a page's colours in light and dark and words under the pointer, is put into its SVG here.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from anybatch._report.page import LIGHT, visible
from anybatch._report.words import short_number

if TYPE_CHECKING:  # only those who draw need matplotlib: the words of this wing are for everyone
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, SOFT, LINE, PAPER = (LIGHT[name] for name in ("ink", "soft", "line", "paper"))
# From the smallest scale to the largest. Each reads on white and on near-black (contrast of 3 or more on both), and
# blue to amber holds for the colour-blind.
RAMP = ("#2f7fdb", "#7a6ae0", "#b356c4", "#d9508a", "#dd5f4a", "#c27a12")
_HOUSE = {
    "axes.axisbelow": True, "axes.edgecolor": SOFT, "axes.grid": True, "axes.labelcolor": SOFT,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.titlecolor": INK,
    "axes.titlesize": "medium", "axes.titleweight": "bold", "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.12, "font.size": 11.0, "grid.color": LINE,
    "legend.frameon": False, "lines.linewidth": 1.6, "lines.scale_dashes": False, "lines.solid_capstyle": "round",
    "text.color": SOFT, "text.parse_math": False,  # a run may be called $x$
    "xtick.bottom": False, "xtick.color": SOFT, "ytick.color": SOFT, "ytick.left": False,
}  # fmt: skip
_PIXELS = 72  # of an SVG, an inch


@contextmanager
def house() -> Iterator[None]:
    """The project's style for all that is drawn within, whatever the user's own is."""
    from matplotlib import style

    with style.context(["default", _HOUSE]):
        yield


def blank(columns: int = 1, *, width: float, height: float, layout: str = "none") -> "tuple[Figure, list[Axes]]":
    """A figure of this size in pixels of an SVG, and its axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _PIXELS, height / _PIXELS), layout=layout)  # type: ignore[arg-type]
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def numbers(axis: "Axis", *, log: bool) -> None:
    """Few round numbers at an axis; at 1, 2 and 5 of each decade where it is logarithmic and short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if log and high < 1000 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6) if log else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ticks = [tick for tick in axis.get_major_locator()() if low <= tick <= high]
    # Where four digits would give two ticks one number, as on a curve from 97.561 to 97.564.
    digits = next((d for d in range(4, 12) if len({short_number(t, d) for t in ticks}) == len(ticks)), 12)
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, digits)))
    axis.set_minor_locator(NullLocator())


def widest(axis: "Axis") -> float:
    """Pixels from an upright axis to the end of its longest number, in matplotlib's own font, which is a wide one."""
    figure = axis.axes.get_figure(root=True)
    if figure is None:  # pragma: no cover
        return 0.0
    figure.draw_without_rendering()
    scale = _PIXELS / figure.dpi
    left = axis.axes.get_window_extent().x0
    return float(scale * (left - min((each.get_window_extent().x0 for each in axis.get_ticklabels()), default=left)))


def colour(place: int, many: int) -> str:
    """The colour of one of `many` places, along the ramp."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    return to_hex(LinearSegmentedColormap.from_list("ramp", RAMP)(place / max(1, many - 1)))


def css(value: str) -> str:
    """Colours by the page's names for them, so that they change with light and dark."""
    for name, light in LIGHT.items():
        value = value.replace(light, f"var(--{name})")
    return value


def inline(figure: "Figure", label: str, titles: Mapping[str, str]) -> str:
    """The figure as SVG inside of a page: in its fonts and colours, without ids, which would meet other figures' ids.

    Args:
        figure: drawn within `house()`, without clips.
        label: what it shows, for those who do not see it.
        titles: for the gid of an artist the words that appear under the pointer; a gid's letters become its class.
    """
    from matplotlib import rc_context

    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for each in root.iter():  # HTML knows what is SVG without namespaces
        each.tag = each.tag.rpartition("}")[2]
        each.attrib = {key.rpartition("}")[2]: value for key, value in each.attrib.items()}
    box = root.attrib["viewBox"]
    marks = {f"#{mark.get('id')}": mark.get("d", "") for mark in root.iter("path")}
    for parent in list(root.iter()):
        for each in [each for each in parent if each.tag in ("metadata", "defs")]:
            parent.remove(each)
    for each in list(root.iter()):
        name = each.get("id", "")
        _settle(each, marks)
        if name in titles:
            each.set("class", name.rstrip("0123456789"))
            each.insert(0, ElementTree.Element("title"))
            each[0].text = "\n".join(map(visible, titles[name].split("\n")))
    root.attrib = {"class": "chart", "viewBox": box, "role": "img", "aria-label": visible(label)}
    return ElementTree.tostring(root, encoding="unicode")


def _settle(each: ElementTree.Element, marks: Mapping[str, str]) -> None:
    """Short numbers, no ids, the page's fonts and colours, and each mark as a path of its own."""
    given, each.attrib, each.tail = each.attrib, {}, None
    if each.tag == "use":
        each.tag = "path"
        given |= {"d": marks[given["href"]], "transform": f"translate({given.pop('x')} {given.pop('y')})"}
    if each.tag != "text":
        each.text = None
    for key in ("d", "x", "y", "transform"):
        if key in given and not given[key].startswith("rotate(-0 "):
            short = re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.1f}".removesuffix(".0"), given[key])
            each.set(key, re.sub(r"\s*([MLCQz])\s*", r"\1", short).strip() if key == "d" else short)
    if "style" in given:
        style = re.sub(r"font: [^;]*?([\d.]+px)[^;]*", r"font-size: \1", given["style"])
        each.set("style", css(re.sub(r"font-family: [^;]*;? ?", "", style)))
