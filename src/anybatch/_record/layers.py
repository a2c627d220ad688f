"""The moments of a step by layer: in a line of a record, in the numbers for a tracker, and averaged over steps."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anybatch._scaling import Moments

ByLayer = Mapping[str, Moments]


def as_json(layers: ByLayer) -> dict[str, list[float]]:
    """Each layer's variance and sqnorm, as a pair."""
    return {name: [found.variance, found.sqnorm] for name, found in layers.items()}


def from_json(value: Any, *, number: Callable[[Any], float]) -> dict[str, Moments]:
    """Invert `as_json`; raises AttributeError, TypeError or ValueError for any other value."""
    return {name: Moments(number(variance), number(sqnorm)) for name, (variance, sqnorm) in value.items()}


def as_numbers(layers: ByLayer) -> dict[str, float]:
    """Each variance and sqnorm under a name of its own."""
    pairs = {name: (("variance", found.variance), ("sqnorm", found.sqnorm)) for name, found in layers.items()}
    return {f"per_layer/{name}/{what}": value for name, pair in pairs.items() for what, value in pair}


def averaged(steps: Iterable[ByLayer]) -> dict[str, Moments]:
    """The mean of each layer's moments over the steps in which both moments are finite."""
    found: dict[str, list[Moments]] = {}
    for step in steps:
        for name, moments in step.items():
            if moments.finite:
                found.setdefault(name, []).append(moments)
    return {
        name: Moments(sum(m.variance for m in each) / len(each), sum(m.sqnorm for m in each) / len(each))
        for name, each in found.items()
    }
