"""Pages and figures about recorded runs and forecasts."""

from anybatch._report.forecast import plot
from anybatch._report.page import Block, Figure, Heading, Table, Text, page
from anybatch._report.report import report

__all__ = [
    "Block",
    "Figure",
    "Heading",
    "Table",
    "Text",
    "page",
    "plot",
    "report",
]
