"""The demo: the digits trained at many batch sizes."""

from anybatch._demo.digits import BASE_BATCH, LAST_RATE, LEARNING_RATE, MOMENTUM, RULES, digits, gradients, network
from anybatch._demo.report import COLUMNS, cells, distances, write
from anybatch._demo.run import Plan, run, significantly_below, summarise, welch

__all__ = [
    "BASE_BATCH",
    "COLUMNS",
    "LAST_RATE",
    "LEARNING_RATE",
    "MOMENTUM",
    "RULES",
    "Plan",
    "cells",
    "digits",
    "distances",
    "gradients",
    "network",
    "run",
    "significantly_below",
    "summarise",
    "welch",
    "write",
]
