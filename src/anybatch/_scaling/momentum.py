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

from math import log
from typing import Literal

Decays = Literal["auto", "clock", "constant"] | float

# Share of the run that a constant momentum may remember at the largest gain, S. In the AdaScale paper's runs, which
# lost nothing, it is 1.6 % at most (cifar10 at S = 64); from 2.7 % on, the least measured here, it costs quality.
MEMORY = 0.02


def automatic(momentum: float, *, scale: float, total: float | None) -> float:
    """The power a that `decays="auto"` stands for: 1/2 where `scale / (1 - momentum)` is above 2 % of `total`, else 0.

    So in a long run a momentum is constant, as in the paper, and in a short one half of the way to the clock. Below the
    base batch, where a step remembers less than at scale 1, it is constant.
    """
    if total is None or scale <= 1:
        return 0.0
    return 0.5 if scale > (1 + 1e-9) * MEMORY * total * (1 - momentum) else 0.0  # 8 is not above .02 * 4000 * (1 - .9)


def momentum_at(momentum: float, iterations: float, *, decays: Decays) -> float:
    """The momentum m' for a step of r = `iterations`, of a buffer that is a sum.

    constant    m' = m
    clock       m' = m ** r
    a number a  m' = m ** (r ** a)
    """
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
