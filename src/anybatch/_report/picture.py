"""Charts in one column of an SVG file, which follows dark mode and is as wide as a phone."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Protocol

from anybatch._report.chart import WIDTH, Legend
from anybatch._report.figure import css
from anybatch._report.page import colours, inert

_EDGE = 12  # pixels of the margin
_TITLE = 26  # pixels for a chart's title
_ROW = 22  # pixels for a row of the legend
_KEY, _LETTER = 46, 7.2  # pixels of an entry's line and gaps, and of a letter
_SENTENCE = 54  # letters in a row of the legend's note


class Drawing(Protocol):
    """A chart, or another picture of a chart's width."""

    @property
    def title(self) -> str:
        """The line above the picture."""

    @property
    def height(self) -> int:
        """The picture's height in pixels."""

    def svg(self) -> str:
        """The picture without its title; empty if there is nothing to draw."""


def picture(charts: Sequence[Drawing], legend: Legend, path: Path) -> Path:
    """Write the legend and the charts in one column into an SVG file.

    A column of 380 pixels needs no scaling on a phone, and is a figure of usual size on a wide page. The file contains
    the colours of light and dark mode, and follows the page's mode even as an image.
    """
    body, y = _legend(legend)
    for chart in charts:
        drawn = chart.svg()
        if drawn:
            y += _TITLE
            body += f'<text x="{_EDGE}" y="{y - 8}" class="title">{inert(chart.title)}</text>'
            place = f'<svg x="{_EDGE}" y="{y}" width="{WIDTH}" height="{chart.height}" '
            body += drawn.replace("<svg ", place, 1)
            y += chart.height
    light, dark = colours()
    width, height = WIDTH + 2 * _EDGE, y + _EDGE
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        "svg{font-family:system-ui,sans-serif;font-size:13px;stroke-linejoin:round;overflow:visible}"
        "text{fill:var(--soft)}.title{fill:var(--ink);font-weight:600}</style>"
        f'<rect width="100%" height="100%" style="fill:var(--paper)"/>{body}</svg>\n',
        encoding="utf-8",
    )
    return path


def _legend(legend: Legend) -> tuple[str, float]:
    """The entries in rows, and the height of the rows."""
    body, x, y = "", float(_EDGE), float(_EDGE + 14)
    for name, colour, dash in legend.entries:
        long = _KEY + _LETTER * len(name)
        if x > _EDGE and x + long > WIDTH + _EDGE:
            x, y = float(_EDGE), y + _ROW
        key = f"stroke:{inert(css(colour))};stroke-width:2.5;stroke-dasharray:{' '.join(map(str, dash)) or 'none'}"
        body += f'<path d="M{x:.0f},{y - 4:.0f}h24" style="{key}"/>'
        body += f'<text x="{x + 30:.0f}" y="{y:.0f}">{inert(name)}</text>'
        x += long
    for sentence in wrap(legend.more, _SENTENCE):
        y += _ROW
        body += f'<text x="{_EDGE}" y="{y:.0f}">{inert(sentence)}</text>'
    return body, y + 8
