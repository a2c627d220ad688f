"""From norms to the values of a step: moments, gain, rules, the clock, schedules and hyperparameters."""

from anybatch._scaling.batch import BatchSize, check_positive, check_steps, split
from anybatch._scaling.clock import Clock
from anybatch._scaling.families import Family, attached, family_of, known_classes, local_of, row_of, second_moment_of
from anybatch._scaling.hyperparameters import Hyperparameters
from anybatch._scaling.moments import (
    EPSILON,
    Averages,
    Estimator,
    Moments,
    Smoothing,
    careful,
    gain,
    horizon_of,
    moments,
    noise_of_efficiency,
    scale_of_efficiency,
    thetas,
)
from anybatch._scaling.momentum import averaged_exponent
from anybatch._scaling.rules import AdaScale, Identity, Linear, Rule, Scaling, SquareRoot, measurement_of
from anybatch._scaling.schedules import ScheduleDriver, drivers_of
from anybatch._scaling.wrappers import (
    HeldScheduler,
    bare_optimizer,
    held_by,
    optimizers_in,
    schedulers_in,
)

__all__ = [
    "EPSILON",
    "AdaScale",
    "Averages",
    "BatchSize",
    "Clock",
    "Estimator",
    "Family",
    "HeldScheduler",
    "Hyperparameters",
    "Identity",
    "Linear",
    "Moments",
    "Rule",
    "Scaling",
    "ScheduleDriver",
    "Smoothing",
    "SquareRoot",
    "attached",
    "averaged_exponent",
    "bare_optimizer",
    "careful",
    "check_positive",
    "check_steps",
    "drivers_of",
    "family_of",
    "gain",
    "held_by",
    "horizon_of",
    "known_classes",
    "local_of",
    "measurement_of",
    "moments",
    "noise_of_efficiency",
    "optimizers_in",
    "row_of",
    "scale_of_efficiency",
    "schedulers_in",
    "second_moment_of",
    "split",
    "thetas",
]
