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
is as noisy as at scale 1. Steps must then go as far as those of scale 1 in the same base iterations:
`averaged_exponent`. Lion's buffer is such a mean too, with beta2 as its memory. A step is along the signs of
`beta1 * buffer + (1 - beta1) * gradient`. So beta1 is a share and not a memory, and is constant:
`interpolated_exponent`.
"""

from math import log
from typing import Literal

Decays = Literal["auto", "clock", "constant"] | float

# Share of the run that a constant momentum may remember at the largest gain, S. In the AdaScale paper's runs, which
# lost nothing, it is 1.6 % at most (cifar10 at S = 64). Here 2.7 and 5.3 % cost nothing significant, 11 % and more did.
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
    """The momentum m' for a step of r = `iterations`.

        constant    m' = m
        clock       m' = m ** r
        a number a  m' = m ** (r ** a)

    What `"auto"` stands for, the caller has found out: `automatic`, for a buffer that is a sum.
    """
    return _power(momentum, clock_power(decays, iterations))


def clock_power(decays: Decays, iterations: float) -> float:
    """The power of a decay in a step of `iterations`: them under `"clock"`, a power of them for a number."""
    if isinstance(decays, str):
        return iterations if decays == "clock" else 1.0
    return _power(iterations, decays)


def averaged_exponent(iterations: float, momentum: float) -> float:
    """The power of r that multiplies the rate of a step along an average of noise with memory `m ** r`.

        f^2 = r * psi(m) / psi(m ** r)          psi(m) = (1 + m) / (1 - m)          r ** exponent = f

    Steps of length lr along averages with memory m are correlated by `m ** distance`, so n of them go
    `sqrt(n * psi(m)) * lr` far. With f as many base iterations go equally far in steps of r. It is r while
    `r * (1 - m)` is small, a multiple of sqrt(r) beyond, and sqrt(r) at m = 0; and r1, then r2 is r1 * r2.
    """
    if iterations == 1 or momentum == 0:
        return 0.5

    def psi(m: float) -> float:
        return (1 + m) / (1 - m)

    return log(iterations * psi(momentum) / psi(_power(momentum, iterations))) / (2 * log(iterations))


def interpolated_exponent(iterations: float, share: float, memory: float) -> float:
    """The power of r that multiplies the rate of a step along `share * average + (1 - share) * gradient`.

        f^2 = r * v(b ** r) / v(b)      v(b) = (1 - share)^2 + share^2 * (1 - b) / (1 + b)      r ** exponent = f

    The average has the memory b before this gradient enters it, and v is the variance of the direction in units of a
    gradient's. As in `averaged_exponent`, steps of the same length along it then go equally far.
    """
    if iterations == 1:
        return 0.5

    def variance(b: float) -> float:
        return (1 - share) ** 2 + share**2 * (1 - b) / (1 + b)

    return 0.5 + log(variance(_power(memory, iterations)) / variance(memory)) / (2 * log(iterations))


def _power(base: float, exponent: float) -> float:
    return float(base**exponent)
