"""The momentum of a step of r base iterations.

[Note: two kinds] SGD, and RMSprop with momentum, add scaled gradients: `b = m * b + g`, and a step of `lr * b`. The
buffer is a sum. A weight of `(1 - m') / (1 - m)` on the gradient that enters it keeps `lr / (1 - m)`, the total
distance that a gradient moves the weights. A constant m remembers `1 / (1 - m)` steps, which are `r / (1 - m)` base
iterations: a share of the run that grows with r. `m ** r` remembers `1 / (1 - m)` base iterations at any r, but it puts
nearly all of `r * lr / (1 - m)` into one step. This limits the stability:

    Immediate share of a step        r * lr * (1 - m') / (1 - m)
    Stable at a curvature h while    h * lr < 2 * (1 + m') * (1 - m) / (r * (1 - m'))

Relative to scale 1, this limit is up to `r * (1 + m) / (1 - m)` times lower on the clock (19 r at m = 0.9), and r times
with a constant m.

Muon normalises its buffer, so the buffer's length does not matter. Its direction does: with `m ** r` it is as noisy as
at scale 1. Steps must then cover the same distance as those of scale 1 in the same base iterations:
`averaged_exponent`. Lion's buffer is a mean too, with beta2 as its memory, and a step is along the signs of `beta1 *
buffer + (1 - beta1) * gradient`. So beta1 is a share, not a memory, and is constant: `interpolated_exponent`.
"""

from math import log
from typing import Literal

Decays = Literal["auto", "clock", "constant"] | float

# The largest memory of a constant momentum at the largest gain, S, as a share of the run. In the AdaScale paper's runs,
# which lost no quality, it is 1.6 % at most (cifar10 at S = 64). Here 2.7 and 5.3 % cost nothing significant, 11 % did.
MEMORY = 0.02


def automatic(momentum: float, *, scale: float, total: float | None) -> float:
    """The power a of `decays="auto"`: 1/2 where `scale / (1 - momentum)` is above 2 % of `total`, else 0.

    So a momentum is constant in a long run, as in the paper, and below the base batch, where its memory is shorter.
    """
    if total is None or scale <= 1:
        return 0.0
    return 0.5 if scale > (1 + 1e-9) * MEMORY * total * (1 - momentum) else 0.0  # 8 is not above .02 * 4000 * (1 - .9)


def clock_power(decays: Decays, iterations: float) -> float:
    """The power of a decay in a step of r = `iterations`: 1 if constant, r on the clock, `r ** a` for a number a."""
    if isinstance(decays, str):
        return iterations if decays == "clock" else 1.0
    return _power(iterations, decays)


def averaged_exponent(iterations: float, momentum: float) -> float:
    """The power of r that multiplies the learning rate of a step along an average of noise with memory `m ** r`.

        F = r ** exponent        F ** 2 = r * psi(m) / psi(m ** r)        psi(m) = (1 + m) / (1 - m)

    Steps along averages with memory m are correlated by `m ** distance`. So n steps of length lr cover a distance of
    `sqrt(n * psi(m)) * lr`. With the factor F, steps of r cover the same distance in the same base iterations. F is r
    while `r * (1 - m)` is small, a multiple of sqrt(r) beyond, and sqrt(r) at m = 0. The factors of r1 and of r2 on top
    of it multiply to that of r1 * r2.
    """
    if iterations == 1 or momentum == 0:
        return 0.5

    def psi(m: float) -> float:
        return (1 + m) / (1 - m)

    return log(iterations * psi(momentum) / psi(_power(momentum, iterations))) / (2 * log(iterations))


def interpolated_exponent(iterations: float, share: float, memory: float) -> float:
    """The power of r that multiplies the learning rate of a step along `share * average + (1 - share) * gradient`.

        F = r ** exponent    F ** 2 = r * v(b ** r) / v(b)    v(b) = (1 - share) ** 2 + share ** 2 * (1 - b) / (1 + b)

    The average has the memory b and excludes the present gradient. The direction's variance is v, relative to that of a
    gradient. As in `averaged_exponent`, steps of the same length along it then cover the same distance.
    """
    if iterations == 1:
        return 0.5

    def variance(b: float) -> float:
        return (1 - share) ** 2 + share**2 * (1 - b) / (1 + b)

    return 0.5 + log(variance(_power(memory, iterations)) / variance(memory)) / (2 * log(iterations))


def _power(base: float, exponent: float) -> float:
    return float(base**exponent)
