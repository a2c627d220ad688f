"""A report: one self-contained HTML page without scripts, with all text escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol
from unicodedata import category

LIGHT = {"paper": "#ffffff", "ink": "#1d2433", "line": "#dfe3ea", "soft": "#5d6778", "bad": "#b42318"}
_DARK = {"paper": "#12161d", "ink": "#e4e8ef", "line": "#2c3440", "soft": "#9aa5b5", "bad": "#f97066"}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
* {{ box-sizing: border-box; }}
html {{ background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }}
body {{ font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; max-width: 70rem; margin: 0 auto;
  padding: 2.5rem 1.25rem 4rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .75rem; }}
h2 {{ font-size: 1.25rem; line-height: 1.3; letter-spacing: -.005em; margin: 3rem 0 .75rem; }}
p {{ margin: .75rem 0; max-width: 46rem; }}
.note, figcaption {{ color: var(--soft); font-size: .9rem; line-height: 1.5; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: separate; border-spacing: 0; font-size: .92rem; line-height: 1.5rem;
  font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: .375rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }}
th {{ color: var(--soft); font-weight: 600; font-size: .85rem; vertical-align: bottom; }}
th.l, td.l {{ text-align: left; }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--paper); }}
th:first-child, td:first-child {{ padding-left: 0; }}
td:first-child {{ max-width: 19rem; white-space: normal; min-width: 9rem; }}
table.words td {{ white-space: normal; min-width: 7rem; max-width: 26rem; vertical-align: top; }}
tr.marked td {{ color: var(--bad); }}
figure {{ margin: 1rem 0; min-width: 0; }}
svg {{ display: block; width: 100%; height: auto; }}
.chart {{ overflow: visible; font-family: inherit; font-variant-numeric: tabular-nums; stroke-linejoin: round; }}
.chart .strip {{ pointer-events: all; }}
.chart .strip:hover path {{ fill: var(--line) !important; }}
.chart .row {{ pointer-events: all; }}
.chart .row:hover path {{ stroke: var(--ink) !important; stroke-width: 1.5px !important; }}
.chart .line:hover path {{ stroke-width: 3px !important; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.25rem 2rem; }}
.grid figure {{ margin: 0; }}
.grid figcaption {{ color: var(--ink); font-weight: 600; }}
.legend {{ list-style: none; padding: 0; margin: 0 0 1rem; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem;
  color: var(--soft); font-size: .9rem; }}
.legend svg {{ display: inline-block; width: 1.6rem; height: .7rem; margin-right: .4rem; color: var(--soft); }}
.legend li {{ max-width: 100%; unicode-bidi: isolate; }}
summary {{ cursor: pointer; color: var(--soft); margin-top: 1rem; }}
@media (max-width: 40rem) {{
  body {{ padding: 1.5rem 1rem 3rem; }} h1 {{ font-size: 1.5rem; }}
  td:first-child {{ max-width: 9.5rem; min-width: 6.5rem; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


class Block(Protocol):
    """A part of the page."""

    def html(self) -> str:
        """The part as HTML."""


@dataclass(frozen=True)
class Heading:
    """A section's heading."""

    text: str

    def html(self) -> str:
        return f"<h2>{inert(self.text)}</h2>"


@dataclass(frozen=True)
class Text:
    """A paragraph; `note` in small print."""

    text: str
    note: bool = False

    def html(self) -> str:
        return f'<p class="note">{inert(self.text)}</p>' if self.note else f"<p>{inert(self.text)}</p>"


@dataclass(frozen=True)
class Table:
    """Rows of cells; the rows whose index is in `marked` are coloured."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    left: int = 2  # number of first columns that are aligned to the left; the others hold numbers
    words: bool = False  # whether the cells hold text, which may wrap

    def html(self) -> str:
        left = len(self.columns) if self.words else self.left
        head = _cells("th", self.columns, left=left)
        kinds = (' class="marked"' if i in self.marked else "" for i in range(len(self.rows)))
        cells = (_cells("td", row, left=left) for row in self.rows)
        rows = "\n".join(f"<tr{kind}>{row}</tr>" for kind, row in zip(kinds, cells, strict=True))
        opening = '<table class="words">' if self.words else "<table>"
        return f'<div class="scroll">{opening}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


@dataclass(frozen=True)
class Fold:
    """Blocks under a summary line that unfolds them."""

    summary: str
    blocks: Sequence[Block]

    def html(self) -> str:
        return f"<details><summary>{inert(self.summary)}</summary>\n{_join(self.blocks)}\n</details>"


@dataclass(frozen=True)
class Grid:
    """Figures side by side if the page is wide enough, else in one column."""

    blocks: Sequence[Block]

    def html(self) -> str:
        return f'<div class="grid">\n{_join(self.blocks)}\n</div>'


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page as HTML."""
    light, dark = colours()
    return _PAGE.format(title=inert(title), body=_join(blocks), light=light, dark=dark)


def colours() -> tuple[str, str]:
    """The colours by name as CSS, in light and in dark."""
    light, dark = (" ".join(f"--{name}: {value};" for name, value in each.items()) for each in (LIGHT, _DARK))
    return light, dark


def inert(text: str) -> str:
    """The text as HTML, with markup escaped and invisible characters written as their codes."""
    return escape(visible(text))


def visible(text: str) -> str:
    """The text with each control character, lone surrogate and direction mark as its Python escape.

    Names from files may contain all of these.
    """
    return "".join(c if category(c)[0] != "C" else ascii(c)[1:-1] for c in text)


def _cells(tag: str, cells: Sequence[str], *, left: int) -> str:
    return "".join(
        f'<{tag} class="l">{inert(cell)}</{tag}>' if i < left else f"<{tag}>{inert(cell)}</{tag}>"
        for i, cell in enumerate(cells)
    )


def _join(blocks: Sequence[Block]) -> str:
    return "\n".join(block.html() for block in blocks)
