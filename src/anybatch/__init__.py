"""anybatch: tune once, train at any batch size."""

from anybatch._attach import attach
from anybatch._batch import split
from anybatch._clock import Clock
from anybatch._controller import Controller
from anybatch._ema import ModelEMA
from anybatch._errors import (
    AnybatchError,
    AnybatchWarning,
    InvalidValueError,
    StateError,
    UnsupportedError,
    UsageError,
)
from anybatch._moments import Moments, gain, moments
from anybatch._record import Run, RunRecord, StepRecord, read_record
from anybatch._rules import AdaScale, Identity, Linear, Rule, Scaling, SquareRoot
from anybatch._version import __version__

__all__ = [
    "AdaScale",
    "AnybatchError",
    "AnybatchWarning",
    "Clock",
    "Controller",
    "Identity",
    "InvalidValueError",
    "Linear",
    "ModelEMA",
    "Moments",
    "Rule",
    "Run",
    "RunRecord",
    "Scaling",
    "SquareRoot",
    "StateError",
    "StepRecord",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "attach",
    "gain",
    "moments",
    "read_record",
    "split",
]
