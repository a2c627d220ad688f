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


def longer_momentum(config: Mapping[str, Any]) -> bool:
    """Whether a momentum is not, or not all of the way, on the clock, so that its memory in tau grows with the scale.

    What "auto" stands for is the clock for betas and for Muon, and constant or half of the way for a momentum.
    """
    decays, name = config.get("decays"), config.get("optimizer")
    if decays == "clock" or real(decays) == 1:
        return False
    kinds: tuple[str, ...] = ("momentum", "betas")
    if decays == "auto":
        kinds = ("momentum",) if isinstance(name, str) and "Muon" not in name else ()
    elif decays != "constant" and real(decays) is None:
        return False
    groups = config.get("param_groups")
    groups = [g for g in groups if isinstance(g, dict)] if isinstance(groups, list) else []
    return any(g.get(kind) for g in groups for kind in kinds)


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
