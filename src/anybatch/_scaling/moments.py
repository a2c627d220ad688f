"""Variance, squared mean, their running averages and the gain, from squared norms.

docs/architecture.md has the notation. `variance` is the trace of the covariance of ONE base batch's gradient, `sqnorm`
the squared norm of the expected gradient.
"""

from dataclasses import dataclass, replace
from math import exp, inf, isfinite, nan
from typing import Literal

from anybatch._errors import InvalidValueError
from anybatch._scaling.batch import check_positive

Estimator = Literal["unbiased", "paper"]
Smoothing = float | Literal["paper"] | None

# Johnson et al. 2020: the floor of the variance before averaging.
EPSILON = 1e-6
# The memory of the averages as a share of the run, in tau (measured on the digits: benchmarks/smoothing.py).
_HORIZON = 0.01


@dataclass(frozen=True)
class Moments:
    """Variance and squared mean of the gradient, in the unit of one base batch.

    Args:
        variance: trace of the covariance of one base batch's gradient, sigma^2, grad^2. A raw estimate may be negative.
        sqnorm: squared norm of the expected gradient, mu^2, grad^2. A raw estimate may be negative.
    """

    variance: float
    sqnorm: float

    @property
    def finite(self) -> bool:
        """Whether both numbers are finite."""
        return isfinite(self.variance) and isfinite(self.sqnorm)

    def with_replacement(self, population: float) -> "Moments":
        """The moments of draws with replacement, from those of one pass over `population` base batches.

            V = variance * (1 - 1/population)        M = sqnorm + variance / population

        Two samples of one pass never share an example, so they are correlated by `-1 / (population - 1)`. Raw moments
        have exactly this error: late in training on little data it is as large as sqnorm.
        """
        return Moments(self.variance * (1 - 1 / population), self.sqnorm + self.variance / population)

    @property
    def noise_scale(self) -> float:
        """`variance / sqnorm` of the clipped moments, in base batches; infinite without a mean, nan for 0/0."""
        variance, sqnorm = max(self.variance, 0.0), max(self.sqnorm, 0.0)
        if sqnorm > 0:
            return variance / sqnorm
        return inf if variance > 0 else nan


def moments(mean_square: float, square_mean: float, *, sample: float, batch: float) -> Moments:
    """Unbiased variance and squared mean from the squared norms of gradient samples.

    A sample `g_i` is the mean gradient over `sample` base batches, and the samples' mean `gbar` is over `batch`.

        variance = (mean_square - square_mean) / (1/sample - 1/batch)
        sqnorm   = square_mean - variance / batch

    `mean_square` is `(1/N) sum_i ||g_i||^2`, `square_mean` is `||gbar||^2`. With N equal samples `batch = N * sample`,
    and the factor is the paper's `N/(N-1) * sample`. The same two lines hold for samples of `b_i` examples with
    weights `w_i` (summing to 1): `mean_square = sum_i w_i ||g_i||^2`, `1/sample = B0 * sum_i w_i/b_i` and `1/batch =
    B0 * sum_i w_i^2/b_i`.

    Args:
        mean_square: mean of the samples' squared norms, grad^2, at least 0.
        square_mean: squared norm of their mean, grad^2, at least 0. Each loss must be the MEAN over its examples:
            `"sum"` losses make the gradient, and both norms, grow with the batch.
        sample: size of one sample in base batches, positive.
        batch: size of the mean in base batches, larger than `sample`: one sample alone has no variance.

    Returns:
        The raw `Moments`: `variance` and `sqnorm`. Either may be negative by chance: average them first, clip last.

    Raises:
        InvalidValueError: a size is not positive, or `batch <= sample`.

    Example:
        >>> anybatch.moments(4.0, 3.0, sample=1, batch=2)      # two base batches: ||g_i||^2 = 4, ||gbar||^2 = 3
        Moments(variance=2.0, sqnorm=2.0)

    Source:
        Johnson et al., AdaScale SGD, ICML 2020, Section 3.4; McCandlish et al. 2018, Appendix A.1.

    Differs from the paper in:
        1. The samples need not be base batches, and the batch need not be a whole number of them.
    """
    check_positive("sample", sample)
    check_positive("batch", batch)
    if batch <= sample:
        raise InvalidValueError(
            f"batch ({batch}) must be larger than sample ({sample}): a variance needs two samples or more."
        )
    variance = (mean_square - square_mean) / (1 / sample - 1 / batch)
    return Moments(variance, square_mean - variance / batch)


def gain(variance: float, sqnorm: float, scale: float) -> float:
    """The base iterations that one step at `scale` replaces: AdaScale's gain ratio.

        r(S) = (variance + sqnorm) / (variance / S + sqnorm)

    Args:
        variance: sigma^2 of one base batch, grad^2; negative estimates count as 0.
        sqnorm: mu^2, grad^2; negative estimates count as 0.
        scale: S, the step's batch over the base batch; positive, may be fractional or below 1.

    Returns:
        The gain, between `min(1, S)` and `max(1, S)`: 1 without noise, S with noise alone, 1 without a gradient.

    Raises:
        InvalidValueError: `scale` is not positive.

    Example:
        >>> anybatch.gain(variance=2.0, sqnorm=2.0, scale=2)
        1.3333333333333333

    Source:
        Johnson et al., AdaScale SGD, ICML 2020, Equation 3. The same number is the ratio of the optimal learning rates
        of McCandlish et al. 2018, Equation 2.6, at the two batch sizes; `r/S` is Pollux's statistical efficiency.

    Differs from the paper in:
        1. `scale` is any positive number; below 1 the gain is below 1.
        2. Nothing is added to either side, so that the gain does not depend on the unit of the gradient.
    """
    check_positive("scale", scale)
    variance, sqnorm = max(variance, 0.0), max(sqnorm, 0.0)
    if scale == 1 or variance == 0:
        return 1.0
    if sqnorm == 0:
        return float(scale)
    # Division by the larger moment prevents overflow and underflow in any unit of the gradient. The last line removes
    # the rounding beyond the bounds.
    noise, signal = (1.0, sqnorm / variance) if variance > sqnorm else (variance / sqnorm, 1.0)
    ratio = (noise + signal) / (noise / scale + signal)
    return min(max(ratio, min(1.0, scale)), max(1.0, scale))


def scale_of_efficiency(efficiency: float, *, noise: float) -> float:
    """The scale at which gain / scale is `efficiency`, in (0, 1); `noise` is variance / sqnorm of a base batch.

    r(S) / S = (noise + 1) / (noise + S) = efficiency
    """
    return noise * (1 / efficiency - 1) + 1 / efficiency  # infinite noise too


def noise_of_efficiency(efficiency: float, *, scale: float) -> float:
    """The inverse of `scale_of_efficiency`: the noise at which gain / scale is `efficiency` at a `scale` above 1."""
    return max(efficiency * scale - 1, 0.0) / (1 - efficiency)


def careful(gain: float, samples: int) -> float:
    """A gain above 1 of n `samples`, drawn towards 1: `gain ** (1 - 2 ** -((n + 1) / 2))`.

    In logarithms this is half of the way after the first sample, and every two samples half of the rest.

    The error of one sample's estimate is as large as the estimate. So sqnorm may be near 0 and the gain near the scale,
    and a few steps later the gain is a small part of it. On yolo-tiny at S = 32, a third step of 16 made one seed of
    two diverge.
    """
    return gain if gain <= 1 else float(gain ** (1 - 2 ** (-(samples + 1) / 2)))


@dataclass(frozen=True)
class Averages:
    """Running averages of the moments; a value, so that a failed step changes nothing.

        X = theta * X + (1 - theta) * x         weight = theta * weight + (1 - theta)         average = X / weight

    Raw moments x have the weighted sum X. The smoothing is theta. The moments are those of one base batch, so the
    averages stay valid when the scale, the ranks or the accumulation change.
    """

    variance: float = 0.0  # weighted sum of raw variances, grad^2
    sqnorm: float = 0.0  # weighted sum of raw squared means, grad^2
    weight: float = 0.0  # sum of the weights, in [0, 1]
    samples: int = 0  # steps that were averaged
    iterations: float = 1.0  # base iterations since the last sample; 1 before the first
    age: int = 1  # steps since the last sample; 1 before the first

    @property
    def moments(self) -> Moments:
        """The averages, debiased and not clipped; nan before the first sample."""
        if self.weight == 0:
            return Moments(nan, nan)
        return Moments(self.variance / self.weight, self.sqnorm / self.weight)

    def updated(
        self,
        raw: Moments,
        *,
        scale: float,
        smoothing: Smoothing,
        estimator: Estimator,
        total: float | None,
        every: int = 1,
    ) -> "Averages":
        """The averages with one more sample, taken at `scale`; each `every`-th step has a sample."""
        steps = max(1, min(self.age, every))  # steps beyond `every` could not be measured, and do not count
        theta = smoothing_factor(smoothing, scale=scale, iterations=self.iterations, total=total, steps=steps)
        if estimator == "paper":
            raw = Moments(max(raw.variance, EPSILON), max(raw.sqnorm, 0.0))
            if self.samples * (1 - theta) < 1:  # a plain mean while t < 1 / (1 - theta)
                theta = self.samples / (self.samples + 1)
        return Averages(
            variance=theta * self.variance + (1 - theta) * raw.variance,
            sqnorm=theta * self.sqnorm + (1 - theta) * raw.sqnorm,
            weight=theta * self.weight + (1 - theta),
            samples=self.samples + 1,
            iterations=0.0,
            age=0,
        )

    def moved(self, iterations: float) -> "Averages":
        """The averages after a step that advanced the clock by `iterations`; a negative number undoes that."""
        if self.samples == 0:
            return self
        step = (iterations > 0) - (iterations < 0)
        return replace(self, iterations=self.iterations + iterations, age=self.age + step)

    def gain(self, scale: float, *, noise_factor: float = 1.0) -> float:
        """The gain at `scale` with `noise_factor` times the variance; the lower bound `min(1, S)` before a sample."""
        if scale == 1:
            return 1.0
        if self.samples == 0:
            return min(1.0, scale)
        return gain(noise_factor * self.moments.variance, self.moments.sqnorm, scale)


def smoothing_factor(
    smoothing: Smoothing, *, scale: float, iterations: float, total: float | None, steps: int = 1
) -> float:
    """The factor `theta` of the averages, `steps` and base `iterations` after the previous sample.

        Smoothing "paper", or None without a total:    `max(1 - S / 1000, 0) ** steps`
        Smoothing None with a total:                   `exp(-iterations / (0.01 * total))`, where that is smaller.
        A number:                                      `smoothing ** steps`

    Source:
        Johnson et al., ICML 2020, Section 3.4 ("paper"). The horizon is this project's: it saves iterations in short
        runs, where a memory of 1000/S iterations is too long. At the paper's own lengths 1000/S is shorter.
    """
    of_step, of_iteration = thetas(smoothing, scale=scale, total=total)
    return min(of_step**steps, float(of_iteration**iterations))


def thetas(smoothing: Smoothing, *, scale: float, total: float | None) -> tuple[float, float]:
    """The factors of the averages for one step and for one base iteration; the shorter memory is used."""
    if isinstance(smoothing, int | float):
        return float(smoothing), 1.0
    return max(1 - scale / 1000, 0.0), exp(-1 / horizon_of(smoothing, total=total))


def horizon_of(smoothing: Smoothing, *, total: float | None) -> float:
    """The memory of the averages on the clock, in base iterations; infinite where it is counted in steps alone."""
    return inf if smoothing is not None or total is None else _HORIZON * total
