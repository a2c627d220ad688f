"""anybatch: tune once, train at any batch size."""

from typing import TYPE_CHECKING

from anybatch._lazy import later
from anybatch._version import __version__

if TYPE_CHECKING:
    from anybatch._branch import branch
    from anybatch._check import check
    from anybatch._controller import BatchController, Controller, Seesaw, attach
    from anybatch._ema import ModelEMA, cosine_decay, ema_state_from, half_life
    from anybatch._errors import (
        AnybatchError,
        AnybatchWarning,
        DivergedError,
        InvalidValueError,
        StateError,
        UnsupportedError,
        UsageError,
    )
    from anybatch._forecast import forecast
    from anybatch._maps import Progressive, scale_hyperparameters, scale_optimizer
    from anybatch._record import RunRecord, StepRecord, iter_record, read_record
    from anybatch._scaling import (
        AdaScale,
        Clock,
        HeldScheduler,
        Identity,
        Linear,
        Rule,
        Scaling,
        SquareRoot,
        gain,
        moments,
        split,
    )
else:
    __getattr__, __dir__ = later(
        __name__,
        ("_branch", "_check", "_controller", "_ema", "_errors", "_forecast", "_maps", "_record", "_scaling"),
        removed={
            **dict.fromkeys(("Check", "Finding"), "anybatch.check"),
            **dict.fromkeys(("Estimate", "Forecast", "ScaleForecast"), "anybatch.forecast"),
            "Change": "anybatch.scale_hyperparameters",
            "MetricRecord": "anybatch.iter_record",
            "Moments": "anybatch.moments",
            "Run": "anybatch.read_record",
        },
    )

__all__ = [
    "AdaScale",
    "AnybatchError",
    "AnybatchWarning",
    "BatchController",
    "Clock",
    "Controller",
    "DivergedError",
    "HeldScheduler",
    "Identity",
    "InvalidValueError",
    "Linear",
    "ModelEMA",
    "Progressive",
    "Rule",
    "RunRecord",
    "Scaling",
    "Seesaw",
    "SquareRoot",
    "StateError",
    "StepRecord",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "attach",
    "branch",
    "check",
    "cosine_decay",
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
