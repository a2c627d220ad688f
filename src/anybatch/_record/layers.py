"""The moments of a step by layer: as a line of a record holds them, as a tracker gets them, and averaged over steps."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anybatch._scaling import Moments

ByLayer = Mapping[str, Moments]


def as_json(layers: ByLayer) -> dict[str, list[float]]:
    """Each layer's variance and sqnorm, as a pair."""
    return {name: [found.variance, found.sqnorm] for name, found in layers.items()}


def from_json(value: Any, *, number: Callable[[Any], float]) -> dict[str, Moments]:
    """What `as_json` made, each number read by `number`.

    Raises:
        AttributeError: it is no object.
        ValueError: it is one, of something else.
    """
    return {name: Moments(*(number(each) for each in _pair(found))) for name, found in value.items()}


def as_numbers(layers: ByLayer) -> dict[str, float]:
    """A name for each number."""
    pairs = {name: (("variance", found.variance), ("sqnorm", found.sqnorm)) for name, found in layers.items()}
    return {f"per_layer/{name}/{what}": value for name, pair in pairs.items() for what, value in pair}


def averaged(looks: Iterable[ByLayer]) -> dict[str, Moments]:
    """The mean of each layer's moments over the looks that have it and in which both are finite."""
    found: dict[str, list[Moments]] = {}
    for look in looks:
        for name, moments in look.items():
            if moments.finite:
                found.setdefault(name, []).append(moments)
    return {
        name: Moments(sum(m.variance for m in each) / len(each), sum(m.sqnorm for m in each) / len(each))
        for name, each in found.items()
    }


def _pair(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError
    return value
