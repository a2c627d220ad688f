"""What a record's header says of the run, read with nothing taken for granted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from anybatch._numbers import real
from anybatch._scaling import Estimator, Smoothing


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


def constant_momentum(config: Mapping[str, Any]) -> bool:
    groups = config.get("param_groups")
    groups = [g for g in groups if isinstance(g, dict)] if isinstance(groups, list) else []
    memories = [g.get(name) for g in groups for name in ("momentum", "betas")]
    return config.get("decays") == "constant" and any(memories)


def adam(config: Mapping[str, Any]) -> bool:
    """Whether one of the run's optimizers is of the Adam family, by its class's name."""
    name = config.get("optimizer")
    return isinstance(name, str) and "Adam" in name


def rule_of(config: Mapping[str, Any], *, noise_factor: float) -> RuleConfig:
    """What the record says of the rule; AdaScale's defaults where it says nothing."""
    estimator, smoothing, rule = config.get("estimator"), config.get("smoothing"), config.get("rule", "AdaScale()")
    number = real(smoothing)
    theta: Smoothing = number if number is not None and 0 <= number < 1 else None
    return RuleConfig(
        adascale=estimator is not None or (isinstance(rule, str) and "AdaScale" in rule),
        estimator=cast("Estimator", estimator) if estimator in ("unbiased", "paper") else "unbiased",
        smoothing="paper" if smoothing == "paper" else theta,
        noise_factor=noise_factor,
    )
