"""How far a step may go: moments, gain and rules; the clock; and what an optimizer makes of a `Scaling`."""

from anybatch._scaling.batch import BatchSize, check_positive, split
from anybatch._scaling.clock import Clock
from anybatch._scaling.hyperparameters import (
    Decays,
    Family,
    attached,
    check_decays,
    family_of,
    local_of,
    row_of,
    scaled,
)
from anybatch._scaling.moments import EPSILON, Averages, Estimator, Moments, Smoothing, gain, moments, smoothing_factor
from anybatch._scaling.rules import AdaScale, Identity, Linear, Rule, Scaling, SquareRoot
from anybatch._scaling.schedules import ScheduleDriver, position_of

__all__ = [
    "EPSILON",
    "AdaScale",
    "Averages",
    "BatchSize",
    "Clock",
    "Decays",
    "Estimator",
    "Family",
    "Identity",
    "Linear",
    "Moments",
    "Rule",
    "Scaling",
    "ScheduleDriver",
    "Smoothing",
    "SquareRoot",
    "attached",
    "check_decays",
    "check_positive",
    "family_of",
    "gain",
    "local_of",
    "moments",
    "position_of",
    "row_of",
    "scaled",
    "smoothing_factor",
    "split",
]
