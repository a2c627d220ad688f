"""A report: one self-contained HTML page of text, tables and pictures; nothing from outside, every word escaped."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #d0d5dd; --soft: #667085; --bad: #b42318; }}
@media (prefers-color-scheme: dark) {{ :root {{ --line: #3a4250; --soft: #98a2b3; --bad: #f97066; }} }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
tr.marked td {{ color: var(--bad); }}
figure {{ margin: 1rem 0; }} figcaption, .note {{ color: var(--soft); font-size: .92rem; }}
img {{ max-width: 100%; height: auto; background: white; border-radius: 6px; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Heading:
    """A section's heading."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `note` in small print."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells; the rows whose index is in `marked` stand out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A PNG file with its caption, embedded in the page."""

    path: Path
    caption: str


Block = Heading | Text | Table | Figure


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page as HTML."""
    return _PAGE.format(title=escape(title), body="\n".join(_block(block) for block in blocks))


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{escape(block.text)}</h2>"
    if isinstance(block, Text):
        return f'<p class="note">{escape(block.text)}</p>' if block.note else f"<p>{escape(block.text)}</p>"
    if isinstance(block, Figure):
        picture = f"data:image/png;base64,{base64.b64encode(block.path.read_bytes()).decode()}"
        caption = escape(block.caption)
        return f'<figure><img alt="{caption}" src="{picture}"><figcaption>{caption}</figcaption></figure>'
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in block.columns)
    rows = "\n".join(_row(row, marked=i in block.marked) for i, row in enumerate(block.rows))
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _row(row: Sequence[str], *, marked: bool) -> str:
    opening = '<tr class="marked">' if marked else "<tr>"
    return opening + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
