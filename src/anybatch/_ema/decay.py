"""The weight of the newest weights in a model average after a number of base iterations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from math import ceil, cos, expm1, log, log1p, pi

from anybatch._errors import InvalidValueError
from anybatch._numbers import positive, real, shown

# The ramp (1 + t) / (_RAMP + 1 + t) of TensorFlow's moving averages. timm, diffusers and torch_ema use it too.
_RAMP = 9
# Simpson's rule over one step: the first number of panels, and the largest number of halvings. A jump of the decay is
# then located to 2**-32 of the step.
_PANELS, _DEPTH = 2, 30
_EXACT, _ROUNDING = 1e-10, 1e-16  # relative error of the integral, and the error of a logarithm near 0


def half_life(span: float, *, base_batch: float | None = None) -> float:
    """Return the decay per base iteration of an average whose memory halves in `span`.

        decay = 0.5 ** (base_batch / span)

    Args:
        span: The half-life, positive: in base iterations, or in the unit of `base_batch` if that is given.
        base_batch: Examples or tokens of one base iteration, positive; 1 if `span` counts base iterations.

    Returns:
        The decay, in [0, 1).

    Raises:
        InvalidValueError: An argument is not positive and finite, or the decay rounds to 1.

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
        raise InvalidValueError(f"span={span!r} is too long: the decay rounds to 1. Use a shorter half-life.")
    return decay


def factors(decay: object) -> tuple[float, ...]:
    """Return one decay or a sequence of different ones as a tuple, each in [0, 1)."""
    values = tuple(decay) if isinstance(decay, Sequence) and not isinstance(decay, str | bytes) else (decay,)
    known = [number for number in map(real, values) if number is not None and 0 <= number < 1]
    if len(known) != len(values):
        raise InvalidValueError(f"decay must be a factor per base iteration in [0, 1), got {shown(decay)}.")
    if not known or len(set(known)) < len(known):
        raise InvalidValueError(f"decay must be at least one number, and all different, got {shown(decay)}.")
    return tuple(known)


def cosine_decay(start: float, *, total: float, end: float = 1.0) -> Callable[[float], float]:
    """Return a decay that rises along a cosine of the clock, as in BYOL and DINO.

        rho(tau) = end - (end - start) * (1 + cos(pi * tau / total)) / 2

    Args:
        start: The decay per base iteration at tau = 0, in (0, 1].
        total: Base iterations until `end`, positive. The decay is constant after that.
        end: The decay at the end, in (0, 1]. At 1 the average no longer moves.

    Returns:
        The function, for `ModelEMA(model, cosine_decay(...), clock=controller.clock)`.

    Raises:
        InvalidValueError: A value is out of range.

    Example:
        >>> rho = anybatch.cosine_decay(0.996, total=1000)
        >>> rho(0), round(rho(500), 6), rho(1000), rho(2000)
        (0.996, 0.998, 1.0, 1.0)

    Source:
        Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, Section 3.2.

    Differs from the paper in:
        1. The argument is the clock in base iterations, not the step. The schedule is the same at any batch size.
    """
    for name, value in (("start", start), ("end", end)):
        number = positive(value)
        if number is None or number > 1:
            raise InvalidValueError(f"{name} must be a decay in (0, 1], got {shown(value)}.")
    if positive(total) is None:
        raise InvalidValueError(f"total must be positive and finite, got {shown(total)}.")
    return _Cosine(start, total, end)


@dataclass(frozen=True)
class _Cosine:
    """The function that `cosine_decay` returns, as a class, so that it can be pickled."""

    start: float
    total: float
    end: float

    def __call__(self, tau: float) -> float:
        done = min(max(tau / self.total, 0.0), 1.0)
        return self.end - (self.end - self.start) * (1 + cos(pi * done)) / 2


def scheduled_weight(decay: Callable[[float], float], *, iterations: float, tau: float) -> float:
    """Return the newest weights' weight for a decay that is a function of tau.

        1 - exp(integral of log(rho) from tau to tau + iterations)

    Simpson's rule halves its panels until the relative error is 1e-10, also at kinks and jumps of rho. So one step of k
    base iterations equals k steps of one.
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


def _log(decay: Callable[[float], float], tau: float) -> float:
    value = decay(tau)
    rho = real(value)
    if rho is None or not 0 < rho <= 1:
        raise InvalidValueError(f"A decay must be in (0, 1], got {shown(value)} at tau = {tau:g}.")
    return log(rho)


def _simpson(width: float, values: Sequence[float]) -> float:
    return width * (values[0] + 4 * values[1] + values[2]) / 6


def interval_weight(kept: Callable[[float, float], float], *, iterations: float, tau: float) -> float:
    """Return the weight of the newest weights; `kept(tau, k)` is the share that k base iterations keep."""
    if iterations == 0:
        return 0.0
    value = kept(tau, iterations)
    share = real(value)
    if share is None or not 0 <= share <= 1:
        raise InvalidValueError(
            f"decay(tau, k) must return the share in [0, 1] that the average keeps, got {shown(value)} for "
            f"k = {iterations:g} base iterations from tau = {tau:g}."
        )
    return 1 - share


def takes_interval(decay: Callable[..., float]) -> bool:
    """Return whether a schedule has two arguments without a default: tau and k, not tau alone."""
    try:
        arguments = signature(decay).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is Parameter.empty for each in arguments) == 2


def new_weight(decay: float, *, iterations: float, tau: float, warmup: bool) -> float:
    """Return the newest weights' weight for a constant decay.

        1 - rho**k        without a warm-up; k = iterations.

    With a warm-up, base iteration t has the decay `min(rho, (1 + t) / (10 + t))`. The ramp ends at the first whole t at
    which it exceeds rho. Its product from tau to tau + k telescopes to `prod_{j=1..9} (tau + j) / (tau + k + j)`, which
    is defined for fractional tau and k. So every division of an interval into steps has the same result to all digits.
    """
    if decay == 0:
        return 1.0 if iterations else 0.0
    ramp = 0.0
    if warmup:
        end = max(0, ceil(((_RAMP + 1) * decay - 1) / (1 - decay)))
        ramp = min(iterations, max(0.0, end - tau))
    kept = (iterations - ramp) * log(decay) - sum(log1p(ramp / (tau + j)) for j in range(1, _RAMP + 1))
    return -expm1(kept)
