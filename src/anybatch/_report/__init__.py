"""Pages and figures about recorded runs and forecasts."""

from anybatch._report.branch import plot_branch
from anybatch._report.chart import Chart, Legend, Line
from anybatch._report.difference import BAND, METHOD, difference
from anybatch._report.figure import INK, colour
from anybatch._report.forecast import plot
from anybatch._report.layers import LayerChart, LayerMap, layer_legend, layer_map, levels
from anybatch._report.page import Block, Grid, Heading, Table, Text, page
from anybatch._report.picture import picture
from anybatch._report.points import thin, value_at
from anybatch._report.report import in_numbers, report
from anybatch._report.words import duration

__all__ = [
    "BAND",
    "INK",
    "METHOD",
    "Block",
    "Chart",
    "Grid",
    "Heading",
    "LayerChart",
    "LayerMap",
    "Legend",
    "Line",
    "Table",
    "Text",
    "colour",
    "difference",
    "duration",
    "in_numbers",
    "layer_legend",
    "layer_map",
    "levels",
    "page",
    "picture",
    "plot",
    "plot_branch",
    "report",
    "thin",
    "value_at",
]
