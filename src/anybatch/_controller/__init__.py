"""The controller: it measures the gain of a step, scales the step and advances the clock."""

from anybatch._controller.accumulation import BatchController, Seesaw
from anybatch._controller.attach import attach
from anybatch._controller.controller import Controller

__all__ = ["BatchController", "Controller", "Seesaw", "attach"]
