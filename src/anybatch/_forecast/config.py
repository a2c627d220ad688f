"""The settings of a run in its record's header, which may be missing or damaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from anybatch._numbers import real
from anybatch._scaling import Estimator, Smoothing


@dataclass(frozen=True)
class RuleConfig:
    """The settings of a rule that a forecast needs: `adascale` is whether it is AdaScale, the others are as there."""

    adascale: bool
    estimator: Estimator
    smoothing: Smoothing
    noise_factor: float


def longer_momentum(config: Mapping[str, Any]) -> bool:
    """Return whether a momentum is not fully on the clock, so that its memory in tau grows with the scale.

    The default "auto" is the clock for betas and for Muon; a momentum is constant or half on the clock.
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


def rule_of(config: Mapping[str, Any], *, noise_factor: float) -> RuleConfig:
    """Return the rule in the header, with AdaScale's defaults for missing settings."""
    estimator, smoothing, rule = config.get("estimator"), config.get("smoothing"), config.get("rule", "AdaScale()")
    number = real(smoothing)
    theta: Smoothing = number if number is not None and 0 <= number < 1 else None
    return RuleConfig(
        adascale=estimator is not None or (isinstance(rule, str) and "AdaScale" in rule),
        estimator=cast("Estimator", estimator) if estimator in ("unbiased", "paper") else "unbiased",
        smoothing="paper" if smoothing == "paper" else theta,
        noise_factor=noise_factor,
    )
