"""From squared norms to variance, squared mean, their running averages, and the gain.

Notation (docs/architecture.md has the table): `B0` base batch, `S` scale, `N` samples, `a` the size of one sample in
base batches, `variance` the trace of the covariance of ONE base batch's gradient, `sqnorm` the squared norm of the
expected gradient.
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
# Share of the whole run, in tau, over which the averages look back (measured on the digits: benchmarks/smoothing.py).
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
        """What draws with replacement would have shown, of samples from one pass over `population` base batches.

            variance' = variance * (1 - 1/population)        sqnorm' = sqnorm + variance / population

        Two samples of one pass are never the same examples, so they are correlated by `-1 / (population - 1)`, and
        raw moments are off by just that: late in training on little data by as much as sqnorm itself.
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

    For samples `g_i`, each the mean gradient over `sample` base batches, whose mean `gbar` is over `batch` of them:

        variance = (mean_square - square_mean) / (1/sample - 1/batch)
        sqnorm   = square_mean - variance / batch

    where `mean_square = (1/N) sum_i ||g_i||^2` and `square_mean = ||gbar||^2`. With N equal samples `batch = N *
    sample` and the factor is the paper's `N/(N-1) * sample`. Samples of `b_i` examples with weights `w_i` (summing to
    1) fit the same two lines, with `mean_square = sum_i w_i ||g_i||^2`, `1/sample = B0 * sum_i w_i/b_i` and
    `1/batch = B0 * sum_i w_i^2/b_i`.

    Args:
        mean_square: mean of the samples' squared norms, grad^2, at least 0.
        square_mean: squared norm of their mean, grad^2, at least 0. Each loss is the MEAN over its examples: of a sum
            the gradient, and with it both norms, would grow with the batch.
        sample: size of one sample in base batches, positive.
        batch: size of the mean in base batches, larger than `sample`: one sample alone shows no variance.

    Returns:
        The raw `Moments`: `variance` and `sqnorm`, of which either may be negative by chance. Average them first, clip
        last.

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
            f"batch ({batch}) must be larger than sample ({sample}): the variance is seen between samples, "
            "so it takes two."
        )
    variance = (mean_square - square_mean) / (1 / sample - 1 / batch)
    return Moments(variance, square_mean - variance / batch)


def gain(variance: float, sqnorm: float, scale: float) -> float:
    """How many base iterations one step at `scale` is worth: AdaScale's gain ratio.

        r(S) = (variance + sqnorm) / (variance / S + sqnorm)

    Args:
        variance: sigma^2 of one base batch, grad^2; negative estimates count as 0.
        sqnorm: mu^2, grad^2; negative estimates count as 0.
        scale: S, the step's batch over the base batch; positive, may be fractional or below 1.

    Returns:
        The gain, between `min(1, S)` and `max(1, S)`: 1 without noise, S when there is nothing but noise. Without
        either (a vanishing gradient) it is 1.

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
    # Divided by the larger moment nothing overflows or vanishes, whatever unit the gradient has; the bounds hold
    # the law against the last bit of rounding.
    noise, signal = (1.0, sqnorm / variance) if variance > sqnorm else (variance / sqnorm, 1.0)
    ratio = (noise + signal) / (noise / scale + signal)
    return min(max(ratio, min(1.0, scale)), max(1.0, scale))


def careful(gain: float, samples: int) -> float:
    """A gain above 1 that rests on few samples, drawn towards 1: `gain ** (1 - 2 ** -((n + 1) / 2))` after n of them.

    After the first sample that is half of the way, in logarithms, and every two steps half of the rest.

    A single sample's estimate is off by its own size: sqnorm may come out near 0, and the gain near the scale, where a
    few steps later it is a small part of that. On yolo-tiny at S = 32 a third step of 16 threw one seed of two off.
    """
    return gain if gain <= 1 else float(gain ** (1 - 2 ** (-(samples + 1) / 2)))


@dataclass(frozen=True)
class Averages:
    """Running averages of the moments; a value, so that a step that fails leaves no trace.

    With raw moments `x_t` of step t and `theta_t` the smoothing:

        sum_t = theta_t * sum_(t-1) + (1 - theta_t) * x_t
        weight_t = theta_t * weight_(t-1) + (1 - theta_t)         average = sum_t / weight_t

    The moments are those of one base batch: they do not change with the scale, so neither do the averages when the
    batch, the ranks or the accumulation change.

    Args:
        variance: weighted sum of raw variances, grad^2.
        sqnorm: weighted sum of raw squared means, grad^2.
        weight: sum of the weights, in [0, 1].
        samples: steps that were averaged.
        iterations: how far the clock moved since the last of them, base iterations; 1 before the first.
        age: steps since the last of them; 1 before the first.
    """

    variance: float = 0.0
    sqnorm: float = 0.0
    weight: float = 0.0
    samples: int = 0
    iterations: float = 1.0
    age: int = 1

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
        """The averages with one more sample, taken at `scale`; `every` so many steps at most are between two."""
        steps = max(1, min(self.age, every))  # one that could not be measured in its turn is no step between
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
        """The averages after a step that moved the clock by `iterations`, or before it, with less than 0."""
        if self.samples == 0:
            return self
        step = (iterations > 0) - (iterations < 0)
        return replace(self, iterations=self.iterations + iterations, age=self.age + step)

    def gain(self, scale: float, *, noise_factor: float = 1.0) -> float:
        """The gain at `scale` with `noise_factor` times the variance; `min(1, S)`, the careful end, where nothing is
        known yet.
        """
        if scale == 1:
            return 1.0
        if self.samples == 0:
            return min(1.0, scale)
        return gain(noise_factor * self.moments.variance, self.moments.sqnorm, scale)


def smoothing_factor(
    smoothing: Smoothing, *, scale: float, iterations: float, total: float | None, steps: int = 1
) -> float:
    """The factor `theta` with which the averages forget at this step.

        theta = max(1 - S / 1000, 0)                   smoothing="paper", or None without a total
        theta = exp(-iterations / (0.01 * total))      smoothing=None, with a total, where that is smaller
        theta = smoothing                              a number

    The first and the last to the power of `steps`, as many as there were since the last sample.

    Args:
        smoothing: `None`, `"paper"` or a number in [0, 1).
        scale: S of this step.
        iterations: how far the clock moved between the previous sample and this one, in base iterations.
        total: base iterations of the whole run, or `None`.

    Source:
        "paper": Johnson et al., ICML 2020, Section 3.4. The horizon is this project's: on short runs, where 1000/S
        iterations are too long a memory, it saves iterations. At the paper's own lengths 1000/S is the shorter one.
    """
    of_step, of_iteration = thetas(smoothing, scale=scale, total=total)
    return min(of_step**steps, float(of_iteration**iterations))


def thetas(smoothing: Smoothing, *, scale: float, total: float | None) -> tuple[float, float]:
    """What the averages keep over one step, and over one base iteration; they forget by the shorter memory."""
    if isinstance(smoothing, int | float):
        return float(smoothing), 1.0
    return max(1 - scale / 1000, 0.0), exp(-1 / horizon_of(smoothing, total=total))


def horizon_of(smoothing: Smoothing, *, total: float | None) -> float:
    """Base iterations over which the averages look back by the clock; infinite where steps alone make them forget."""
    return inf if smoothing is not None or total is None else _HORIZON * total
