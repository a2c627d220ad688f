"""The commands of `anybatch`, one module for each."""

from anybatch._commands.branch import branch
from anybatch._commands.demo import demo
from anybatch._commands.forecast import forecast
from anybatch._commands.plan import plan
from anybatch._commands.report import report

__all__ = [
    "branch",
    "demo",
    "forecast",
    "plan",
    "report",
]
