"""What becomes of a momentum in a step of r base iterations.

[Note: two kinds] SGD, and RMSprop with momentum, add what they have scaled already: `b = m * b + g`, and a step of
`lr * b`. Such a buffer is a sum, and with `(1 - m') / (1 - m)` on the gradient that enters it `lr / (1 - m)` stays what
it is: how far a gradient goes in the end. A constant m remembers `1 / (1 - m)` steps, which are `r / (1 - m)` base
iterations: a larger share of the run, the larger r. `m ** r` remembers `1 / (1 - m)` base iterations at any r, but it
puts nearly all of `r * lr / (1 - m)` into one step, and that is what stability is about:

    the immediate share of a step       r * lr * (1 - m') / (1 - m)
    stable on a curvature h while       h * lr < 2 * (1 + m') * (1 - m) / (r * (1 - m'))

On the clock that is up to `r * (1 + m) / (1 - m)` times closer than at scale 1 (19 r at m = 0.9), constant r times.

Muon normalises what its buffer holds, so the buffer's length does not matter, and its direction does: with `m ** r` it
is as noisy as at scale 1. A step must then go as far as r steps of scale 1 do, `rms_exponent`.
"""

from math import log, sqrt
from typing import Literal

Decays = Literal["auto", "clock", "constant"] | float

# Share of the run that a momentum may remember. In all of the AdaScale paper's runs a constant one remembers less
# (Table 2: at most 0.7 %, cifar10 at S = 64); a few per cent cost quality (docs/same-training.md).
MEMORY = 0.01


def momentum_at(momentum: float, iterations: float, *, decays: Decays, total: float | None) -> float:
    """The momentum m' for a step of r = `iterations`, of a buffer that is a sum.

        constant    m' = m
        clock       m' = m ** r
        a number a  m' = m ** (r ** a)
        auto        m' = 1 - r / (0.01 * total), within [m ** sqrt(r), m]

    Automatic, the momentum remembers what it does in steps, but no more than 1 % of the run, and goes for that no
    further than half of the way to the clock. Without a total, and below the base batch, it is constant.
    """
    if decays == "constant" or iterations == 1 or (decays == "auto" and total is None):
        return momentum
    if decays == "auto" and total is not None:
        least = _power(momentum, sqrt(max(iterations, 1.0)))
        return min(max(1 - iterations / (MEMORY * total), least), momentum)
    return _power(momentum, clock_power(decays, iterations))


def clock_power(decays: Decays, iterations: float) -> float:
    """The power of a decay in a step of `iterations`: them under `"clock"`, a power of them for a number."""
    if isinstance(decays, str):
        return iterations if decays == "clock" else 1.0
    return _power(iterations, decays)


def rms_exponent(iterations: float, momentum: float) -> float:
    """The power of r that is the distance of r steps of scale 1, in steps, where each direction is an average of noise.

        f^2 = r * (1 + m) / (1 - m) - 2 * m * (1 - m ** r) / (1 - m) ** 2          r ** exponent = f

    The directions of averages of noise with memory m are correlated by `m ** distance`; f^2 is the sum of all pairs. So
    f is r while `r * (1 - m)` is small, and a multiple of sqrt(r) beyond; at m = 0 it is sqrt(r).
    """
    if iterations == 1 or momentum == 0:
        return 0.5
    r, m = iterations, momentum
    square = r * (1 + m) / (1 - m) - 2 * m * (1 - m**r) / (1 - m) ** 2
    return min(max(log(square) / (2 * log(r)), 0.5), 1.0) if square > 0 else 1.0


def _power(base: float, exponent: float) -> float:
    return float(base**exponent)
