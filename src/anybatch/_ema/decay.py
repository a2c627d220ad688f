"""How much of a model average a stretch of the clock replaces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from math import ceil, cos, expm1, log, log1p, pi

from anybatch._errors import InvalidValueError
from anybatch._numbers import positive, real, shown

# The ramp (1 + t) / (_RAMP + 1 + t) of TensorFlow's moving averages, which timm, diffusers and torch_ema have too.
_RAMP = 9
# Of Simpson's rule over one step: panels to begin with, and halvings of one, so that a jump is known to 2**-32 of the
# step. Then the error of the integral, relative, and of a logarithm near 0.
_PANELS, _DEPTH = 2, 30
_EXACT, _ROUNDING = 1e-10, 1e-16


def half_life(span: float, *, base_batch: float | None = None) -> float:
    """The decay per base iteration of an average in which weights count half as much after `span`.

        decay = 0.5 ** (base_batch / span)

    Args:
        span: the half-life, positive: in base iterations, or in the unit of `base_batch`, if that is given.
        base_batch: examples or tokens of one base iteration, positive; 1 if `span` counts base iterations.

    Returns:
        The decay, in [0, 1).

    Raises:
        InvalidValueError: an argument is not positive and finite, or the decay would round to 1.

    Example:
        >>> anybatch.half_life(1)
        0.5
        >>> anybatch.half_life(5_000_000, base_batch=256) == anybatch.half_life(5_000_000 / 256)
        True
    """
    known = []
    for name, value in (("span", span), ("base_batch", 1 if base_batch is None else base_batch)):
        number = positive(value)
        if number is None:
            raise InvalidValueError(f"{name} must be positive and finite, got {shown(value)}.")
        known.append(number)
    decay = float(0.5 ** (known[1] / known[0]))
    if decay >= 1:
        raise InvalidValueError(f"A half-life of {span!r} is too long: its decay rounds to 1, an average that stays.")
    return decay


def factors(decay: object) -> tuple[float, ...]:
    """One decay or several, in [0, 1) each.

    Raises:
        InvalidValueError: something else, or two that are the same.
    """
    given = tuple(decay) if isinstance(decay, Sequence) and not isinstance(decay, str | bytes) else (decay,)
    known = [number for number in map(real, given) if number is not None and 0 <= number < 1]
    if len(known) != len(given):
        raise InvalidValueError(f"decay is a factor per base iteration in [0, 1), got {shown(decay)}.")
    if not known or len(set(known)) < len(known):
        raise InvalidValueError(f"Several decays must be different, and at least one, got {shown(decay)}.")
    return tuple(known)


def cosine_decay(start: float, *, total: float, end: float = 1.0) -> Callable[[float], float]:
    """The decay that rises along a cosine, as BYOL's and DINO's teachers have it; a function of the clock.

        rho(tau) = end - (end - start) * (1 + cos(pi * tau / total)) / 2

    Args:
        start: the decay per base iteration at tau = 0, in (0, 1].
        total: base iterations until `end`, positive; from there on it stays.
        end: the decay at the end, in (0, 1]; at 1 the average stands still.

    Returns:
        The function, for `ModelEMA(model, cosine_decay(...), clock=controller.clock)`.

    Raises:
        InvalidValueError: a value out of range.

    Example:
        >>> rho = anybatch.cosine_decay(0.996, total=1000)
        >>> rho(0), round(rho(500), 6), rho(1000), rho(2000)
        (0.996, 0.998, 1.0, 1.0)

    Source:
        Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, Section 3.2.

    Differs from the paper in:
        1. Its argument is the clock, base iterations, in place of steps: the same schedule at any batch size.
    """
    for name, value in (("start", start), ("end", end)):
        number = positive(value)
        if number is None or number > 1:
            raise InvalidValueError(f"{name} is a decay in (0, 1], got {shown(value)}.")
    if positive(total) is None:
        raise InvalidValueError(f"total must be positive and finite, got {shown(total)}.")
    return _Cosine(start, total, end)


@dataclass(frozen=True)
class _Cosine:
    """The function of `cosine_decay`: an object of a class, so that it can be pickled."""

    start: float
    total: float
    end: float

    def __call__(self, tau: float) -> float:
        done = min(max(tau / self.total, 0.0), 1.0)
        return self.end - (self.end - self.start) * (1 + cos(pi * done)) / 2


def scheduled_weight(decay: Callable[[float], float], *, iterations: float, tau: float) -> float:
    """The weight of the newest weights after `iterations` more base iterations from `tau` on, of a decay that changes.

        1 - exp(integral of log(rho) from tau to tau + k)

    by Simpson's rule, with each part of the stretch halved until the integral is exact to 1e-10 of itself, through
    kinks and jumps of rho too: a step of k base iterations is k steps of one.

    Raises:
        InvalidValueError: the schedule left (0, 1].
    """
    if iterations == 0:
        return 0.0
    width = iterations / _PANELS
    logs = [_log(decay, tau + i * width / 2) for i in range(2 * _PANELS + 1)]
    panels = [(tau + i * width, width, logs[2 * i : 2 * i + 3], 0) for i in range(_PANELS)]
    exact = max(_EXACT * abs(sum(_simpson(width, values) for _, _, values, _ in panels)) / iterations, _ROUNDING)
    integral = 0.0
    while panels:
        start, width, (left, middle, right), depth = panels.pop()
        inner = [_log(decay, start + width / 4), _log(decay, start + 3 * width / 4)]
        halves = [left, inner[0], middle], [middle, inner[1], right]
        whole, fine = _simpson(width, [left, middle, right]), sum(_simpson(width / 2, half) for half in halves)
        if depth >= _DEPTH or abs(fine - whole) <= exact * width:
            integral += fine
        else:
            panels += [(start + i * width / 2, width / 2, half, depth + 1) for i, half in enumerate(halves)]
    return -expm1(integral)


def stretch_weight(kept: Callable[[float, float], float], *, iterations: float, tau: float) -> float:
    """The weight of the newest weights, by a function that gives what a stretch of the clock keeps.

    Raises:
        InvalidValueError: it left [0, 1].
    """
    if iterations == 0:
        return 0.0
    given = kept(tau, iterations)
    share = real(given)
    if share is None or not 0 <= share <= 1:
        raise InvalidValueError(
            f"A stretch keeps a share in [0, 1] of an average, got {shown(given)} for {iterations:g} base iterations "
            f"from tau = {tau:g}."
        )
    return 1 - share


def takes_stretches(decay: Callable[..., float]) -> bool:
    """Whether a schedule is a function of tau and k, and not of tau alone, by its arguments without a default."""
    try:
        arguments = signature(decay).parameters.values()
    except (TypeError, ValueError):  # a builtin without one
        return False
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is Parameter.empty for each in arguments) == 2


def _log(decay: Callable[[float], float], tau: float) -> float:
    given = decay(tau)
    rho = real(given)
    if rho is None or not 0 < rho <= 1:
        raise InvalidValueError(f"A decay is in (0, 1], got {shown(given)} at tau = {tau:g}.")
    return log(rho)


def _simpson(width: float, values: Sequence[float]) -> float:
    return width * (values[0] + 4 * values[1] + values[2]) / 6


def new_weight(decay: float, *, iterations: float, tau: float, warmup: bool) -> float:
    """The weight of the newest weights after `iterations` more base iterations, from `tau` on.

        1 - rho**k        without a warm-up

    With one, base iteration t has the decay `min(rho, (1 + t) / (10 + t))`. The product of the ramp from tau to tau + k
    telescopes: `prod_{j=1..9} (tau + j) / (tau + k + j)`, which has a meaning for a fractional tau and k, too. The ramp
    ends at the first whole t at which it is above rho. So one step of k base iterations is k steps of one, and any
    other division of the same stretch, to all digits.
    """
    if decay == 0:
        return 1.0 if iterations else 0.0
    ramp = 0.0
    if warmup:
        end = max(0, ceil(((_RAMP + 1) * decay - 1) / (1 - decay)))
        ramp = min(iterations, max(0.0, end - tau))
    kept = (iterations - ramp) * log(decay) - sum(log1p(ramp / (tau + j)) for j in range(1, _RAMP + 1))
    return -expm1(kept)
