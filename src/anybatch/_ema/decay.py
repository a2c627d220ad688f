"""How much of a model average a stretch of the clock replaces."""

from math import ceil, expm1, isfinite, log, log1p

from anybatch._errors import InvalidValueError

# The ramp (1 + t) / (_RAMP + 1 + t) of TensorFlow's moving averages, which timm, diffusers and torch_ema have too.
_RAMP = 9


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
    for name, value in (("span", span), ("base_batch", 1 if base_batch is None else base_batch)):
        if not (isfinite(value) and value > 0):
            raise InvalidValueError(f"{name} must be positive and finite, got {value!r}.")
    decay = float(0.5 ** ((1 if base_batch is None else base_batch) / span))
    if decay >= 1:
        raise InvalidValueError(f"A half-life of {span!r} is too long: its decay rounds to 1, an average that stays.")
    return decay


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
