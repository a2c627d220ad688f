"""What a record's header says of the run, read with nothing taken for granted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from anybatch._numbers import real
from anybatch._scaling import Estimator, Smoothing

# How far training itself drifts, for each doubling from the record's scale to a larger one: the widest seen, down and
# up, of the logarithm of the steps beyond total / S (benchmarks/forecast.py, docs/forecast.md).
_DRIFT = (0.07, 0.14)
_DRIFT_CONSTANT_MOMENTUM = (0.10, 0.14)


@dataclass(frozen=True)
class RuleConfig:
    """What of a rule the forecast needs.

    Args:
        adascale: whether it is AdaScale's.
        estimator, smoothing, noise_factor: as in `AdaScale`.
    """

    adascale: bool
    estimator: Estimator
    smoothing: Smoothing
    noise_factor: float


def drift(config: Mapping[str, Any]) -> tuple[float, float]:
    """How far a doubling of the scale may take the steps beyond `total / S` from the forecast, down and up.

    Up, because large steps meet curvature, which shows as a larger mean gradient and a smaller gain. Down, because a
    constant momentum is a longer memory at a larger scale.
    """
    return _DRIFT_CONSTANT_MOMENTUM if constant_momentum(config) else _DRIFT


def constant_momentum(config: Mapping[str, Any]) -> bool:
    groups = config.get("param_groups")
    groups = [g for g in groups if isinstance(g, dict)] if isinstance(groups, list) else []
    memories = [g.get(name) for g in groups for name in ("momentum", "betas")]
    return config.get("decays") == "constant" and any(memories)


def rule_of(config: Mapping[str, Any], *, noise_factor: float) -> RuleConfig:
    """What the record says of the rule; AdaScale's defaults where it says nothing."""
    estimator, smoothing, rule = config.get("estimator"), config.get("smoothing"), config.get("rule", "AdaScale()")
    number = real(smoothing)
    theta: Smoothing = number if number is not None and 0 <= number < 1 else None
    return RuleConfig(
        adascale=estimator is not None or (isinstance(rule, str) and "AdaScale" in rule),
        estimator=cast("Estimator", estimator) if estimator in ("unbiased", "paper", "ratio") else "unbiased",
        smoothing="paper" if smoothing == "paper" else theta,
        noise_factor=noise_factor,
    )
