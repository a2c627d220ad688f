"""Drawing: matplotlib in the project's style, as a file or as SVG inside of a page.

Matplotlib keeps a page small and free of scripts, and draws the PNG files of the docs by the same code. Plotly, Bokeh
and Vega-Lite have better tooltips, but add 0.9 to 4.8 MB of script to each page. Without scripts, as in a mail, such a
page is empty. pygal's pages are larger still, and it has no bands. This module adds to matplotlib's SVG what it lacks:
a page's colours in light and dark mode, and tooltips.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from anybatch._report.page import LIGHT, visible
from anybatch._report.words import short_number

if TYPE_CHECKING:  # only drawing needs matplotlib
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, SOFT, LINE, PAPER = (LIGHT[name] for name in ("ink", "soft", "line", "paper"))
# From the smallest scale to the largest. Each has a contrast of 3 or more on white and on near-black, and the
# colour-blind can distinguish blue to amber.
RAMP = ("#2f7fdb", "#7a6ae0", "#b356c4", "#d9508a", "#dd5f4a", "#c27a12")
_STYLE = {
    "axes.axisbelow": True, "axes.edgecolor": SOFT, "axes.grid": True, "axes.labelcolor": SOFT,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.titlecolor": INK,
    "axes.titlesize": "medium", "axes.titleweight": "bold", "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.12, "font.size": 11.0, "grid.color": LINE,
    "legend.frameon": False, "lines.linewidth": 1.6, "lines.scale_dashes": False, "lines.solid_capstyle": "round",
    "text.color": SOFT, "text.parse_math": False,  # a run may be called $x$
    "xtick.bottom": False, "xtick.color": SOFT, "ytick.color": SOFT, "ytick.left": False,
}  # fmt: skip
_PIXELS = 72  # pixels of an SVG per inch


@contextmanager
def project_style() -> Iterator[None]:
    """Draw in the project's style instead of the user's."""
    from matplotlib import style

    with style.context(["default", _STYLE]):
        yield


def blank(columns: int = 1, *, width: float, height: float, layout: str = "none") -> "tuple[Figure, list[Axes]]":
    """A figure of this size in pixels, and its axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _PIXELS, height / _PIXELS), layout=layout)  # type: ignore[arg-type]
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def numbers(axis: "Axis", *, log: bool) -> None:
    """Label an axis with few round numbers; a short logarithmic axis has 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if log and high < 1000 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6) if log else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ticks = [tick for tick in axis.get_major_locator()() if low <= tick <= high]
    # More than four where two ticks would have the same number, as between 97.561 and 97.564.
    digits = next((d for d in range(4, 12) if len({short_number(t, d) for t in ticks}) == len(ticks)), 12)
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, digits)))
    axis.set_minor_locator(NullLocator())


def widest(axis: "Axis") -> float:
    """Pixels from a vertical axis to the end of its longest number, in matplotlib's font, which is a wide one."""
    figure = axis.axes.get_figure(root=True)
    if figure is None:  # pragma: no cover
        return 0.0
    figure.draw_without_rendering()
    scale = _PIXELS / figure.dpi
    left = axis.axes.get_window_extent().x0
    return float(scale * (left - min((each.get_window_extent().x0 for each in axis.get_ticklabels()), default=left)))


def colour(place: int, many: int) -> str:
    """The colour at index `place` of `many` along the ramp."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    return to_hex(LinearSegmentedColormap.from_list("ramp", RAMP)(place / max(1, many - 1)))


def css(value: str) -> str:
    """Replace colours by the page's CSS variables, which follow light and dark mode."""
    for name, light in LIGHT.items():
        value = value.replace(light, f"var(--{name})")
    return value


def inline(figure: "Figure", label: str, titles: Mapping[str, str]) -> str:
    """The figure as SVG inside of a page, in the page's fonts and colours, without ids, which might repeat on the page.

    The figure is drawn within `project_style()`, without clips. `label` is a description for screen readers. `titles`
    has the tooltips of artists by gid; a gid's letters become the class.
    """
    from matplotlib import rc_context

    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for each in root.iter():  # HTML needs no SVG namespaces
        each.tag = each.tag.rpartition("}")[2]
        each.attrib = {key.rpartition("}")[2]: value for key, value in each.attrib.items()}
    box = root.attrib["viewBox"]
    marks = {f"#{mark.get('id')}": mark.get("d", "") for mark in root.iter("path")}
    for parent in list(root.iter()):
        for each in [each for each in parent if each.tag in ("metadata", "defs")]:
            parent.remove(each)
    for each in list(root.iter()):
        name = each.get("id", "")
        _simplify(each, marks)
        if name in titles:
            each.set("class", name.rstrip("0123456789"))
            each.insert(0, ElementTree.Element("title"))
            each[0].text = "\n".join(map(visible, titles[name].split("\n")))
    root.attrib = {"class": "chart", "viewBox": box, "role": "img", "aria-label": visible(label)}
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(each: ElementTree.Element, marks: Mapping[str, str]) -> None:
    """Shorten numbers, drop ids, use the page's fonts and colours, and turn each mark into a path."""
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
