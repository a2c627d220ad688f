"""anybatch: tune once, train at any batch size."""

from anybatch._accumulation import BatchController, Seesaw
from anybatch._attach import attach
from anybatch._batch import split
from anybatch._clock import Clock
from anybatch._controller import Controller
from anybatch._ema import ModelEMA
from anybatch._ema_decay import half_life
from anybatch._ema_import import ema_state_from
from anybatch._errors import (
    AnybatchError,
    AnybatchWarning,
    InvalidValueError,
    StateError,
    UnsupportedError,
    UsageError,
)
from anybatch._forecast import Forecast, ScaleForecast, forecast
from anybatch._forecast_steps import Estimate
from anybatch._maps import Change, scale_hyperparameters
from anybatch._moments import Moments, gain, moments
from anybatch._progressive import Progressive
from anybatch._record import MetricRecord, Run, StepRecord, iter_record, read_record
from anybatch._rescale import scale_optimizer
from anybatch._rules import AdaScale, Identity, Linear, Rule, Scaling, SquareRoot
from anybatch._version import __version__
from anybatch._writer import RunRecord

__all__ = [
    "AdaScale",
    "AnybatchError",
    "AnybatchWarning",
    "BatchController",
    "Change",
    "Clock",
    "Controller",
    "Estimate",
    "Forecast",
    "Identity",
    "InvalidValueError",
    "Linear",
    "MetricRecord",
    "ModelEMA",
    "Moments",
    "Progressive",
    "Rule",
    "Run",
    "RunRecord",
    "ScaleForecast",
    "Scaling",
    "Seesaw",
    "SquareRoot",
    "StateError",
    "StepRecord",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "attach",
    "ema_state_from",
    "forecast",
    "gain",
    "half_life",
    "iter_record",
    "moments",
    "read_record",
    "scale_hyperparameters",
    "scale_optimizer",
    "split",
]
