"""The order of one step: what was seen is judged, the step is scaled, the clock moves."""

from anybatch._controller.accumulation import BatchController, Seesaw
from anybatch._controller.attach import attach
from anybatch._controller.controller import Controller

__all__ = [
    "BatchController",
    "Controller",
    "Seesaw",
    "attach",
]
