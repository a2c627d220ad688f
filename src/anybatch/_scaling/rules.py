"""The rules: each maps the scale, the gain and the clock to the length of a step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import ClassVar, Literal

from torch.optim import Optimizer

from anybatch._errors import InvalidValueError
from anybatch._scaling.batch import check_positive, check_steps
from anybatch._scaling.clock import Clock
from anybatch._scaling.moments import Estimator, Smoothing
from anybatch._scaling.momentum import Decays


@dataclass(frozen=True)
class Scaling:
    """The result of a rule for one step.

    Args:
        lr_factor: the factor on the base learning rate `lr(tau)`.
        iterations: the clock's advance, in base iterations.
    """

    lr_factor: float
    iterations: float


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A rule maps a step's scale, its gain and the clock to a `Scaling`.

    To write your own, subclass and implement `__call__`. If it needs the gain, set `measures = True` in the class: the
    gain is then measured with the defaults of `AdaScale`. Subclass `AdaScale` for its options.

    Args:
        decays: the optimizer's own decays in a step of r = `iterations`.
            `"clock"`: `decay ** r`, a memory of the same base iterations at any batch; AdamW's weight decay follows.
            `"constant"`: unchanged, a memory of the same number of steps.
            A number a in [0, 1]: `decay ** (r ** a)`, between the two.
            `"auto"`: the clock for averages (Adam's betas, RMSprop's alpha) and for a momentum that is normalised
            afterwards (Muon). A momentum m that is a sum (SGD's, RMSprop's) remembers at most `S / (1 - m)` base
            iterations. It is constant where these are at most 2 % of `total`, as in all runs of the AdaScale paper. In
            a shorter run, under AdaScale, a = 1/2.
    """

    measures: ClassVar[bool] = False  # whether the gain is measured for this rule

    decays: Decays = "auto"

    def __post_init__(self) -> None:
        number = isinstance(self.decays, int | float) and not isinstance(self.decays, bool) and 0 <= self.decays <= 1
        if self.decays not in ("auto", "clock", "constant") and not number:
            raise InvalidValueError(
                f'decays must be "auto", "clock", "constant" or a number in [0, 1], got {self.decays!r}.'
            )

    @abstractmethod
    def __call__(self, *, scale: float, gain: float, clock: Clock, exponent: float) -> Scaling:
        """The scaling of one step.

        Args:
            scale: S of this step, positive.
            gain: the gain r of this step; nan for a rule that does not measure.
            clock: the clock before the step.
            exponent: how the optimizer's learning rate follows the batch: 1 for SGD, 1/2 for the Adam family, between
                the two for Muon.
        """


@dataclass(frozen=True, kw_only=True)
class Identity(Rule):
    """Identity scaling: `lr_factor = 1`, `iterations = 1`, whatever the batch. Exact when the gradient has no noise.

    Args:
        decays: as for every `Rule`.

    Example:
        >>> anybatch.Identity()(scale=8, gain=float("nan"), clock=anybatch.Clock(), exponent=1)
        Scaling(lr_factor=1.0, iterations=1.0)

    Source:
        Johnson et al., ICML 2020, Section 3.1 and Proposition 1.
    """

    def __call__(self, *, scale: float, gain: float, clock: Clock, exponent: float) -> Scaling:  # noqa: ARG002
        return Scaling(1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Linear(Rule):
    """Linear scaling; LSW with a warm-up, and LSW+ with a stretched one.

        lr_factor  = 1 + (S - 1) * min(1, (tau / total) / warmup)       iterations = S, or total / steps

    Args:
        warmup: share of the run over which the factor ramps from 1 to S; in [0, 1). The paper's is 0.055.
        steps: number of optimizer steps of the whole run; `None` for `ceil(total / S)`. With AdaScale's number this
            is the paper's LSW+: the same curve, stretched along the iterations.
        decays: as for every `Rule`.

    Raises:
        InvalidValueError: a value out of range; at the first step, a warm-up or `steps` without a `total`.

    Example:
        >>> clock = anybatch.Clock(total=1000)
        >>> lsw = anybatch.Linear(warmup=0.055)
        >>> lsw(scale=8, gain=float("nan"), clock=clock, exponent=1)
        Scaling(lr_factor=1.0, iterations=8.0)
        >>> clock.advance(27.5)                                           # half of the warm-up
        >>> lsw(scale=8, gain=float("nan"), clock=clock, exponent=1)
        Scaling(lr_factor=4.5, iterations=8.0)

    Source:
        Goyal et al. 2017; Johnson et al., ICML 2020, Section 4 (LSW, LSW+).

    Differs from the paper in:
        1. During the warm-up the factor multiplies `lr(tau)`; the paper's ramp is from `lr(0)` to `S * lr(0)`.
    """

    warmup: float = 0.0
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.warmup < 1:
            raise InvalidValueError(f"warmup is a share of the run in [0, 1), got {self.warmup}.")
        if self.steps is not None:
            check_positive("steps", self.steps)

    def __call__(self, *, scale: float, gain: float, clock: Clock, exponent: float) -> Scaling:  # noqa: ARG002
        if clock.total is None and (self.warmup or self.steps):
            raise InvalidValueError(f"{self} needs total=, the base iterations of the whole run.")
        ramp = 1.0
        if clock.total is not None and self.warmup:
            ramp = min(1.0, clock.tau / clock.total / self.warmup)
        iterations = scale if self.steps is None or clock.total is None else clock.total / self.steps
        return Scaling(1 + (scale - 1) * ramp, float(iterations))


@dataclass(frozen=True, kw_only=True)
class SquareRoot(Rule):
    """Square-root scaling: `lr_factor = sqrt(S)`, `iterations = S`.

    On the Adam family, whose decays are on the clock by default, this is the SDE scaling rule: betas become
    `beta ** S` and AdamW's weight decay is multiplied by `sqrt(S)`.

    Args:
        decays: as for every `Rule`.

    Example:
        >>> anybatch.SquareRoot()(scale=16, gain=float("nan"), clock=anybatch.Clock(), exponent=0.5)
        Scaling(lr_factor=4.0, iterations=16.0)

    Source:
        Krizhevsky 2014; Malladi et al. 2022 (Adam's square-root rule).

    Differs from the paper in:
        1. `beta ** S` in place of `1 - S * (1 - beta)`: equal to first order, and valid at every S.
        2. Adam's epsilon is unchanged.
    """

    def __call__(self, *, scale: float, gain: float, clock: Clock, exponent: float) -> Scaling:  # noqa: ARG002
        return Scaling(sqrt(scale), float(scale))


@dataclass(frozen=True, kw_only=True)
class AdaScale(Rule):
    """AdaScale: the gain, from the measured noise of the gradient, sets the length of the step.

        r = (variance + sqnorm) / (variance / S + sqnorm)          with noise_factor times the measured variance
        lr_factor = r ** exponent        iterations = r

    `exponent` is 1 for SGD and 1/2 for the Adam family. A constant r = 1 is identity scaling, r = S linear scaling.

    Args:
        estimator: the gain from the two moments.
            `"unbiased"`: raw moments are averaged, debiased, and clipped only when read. The first gains, of n samples,
            are drawn towards 1: `r ** (1 - 2 ** -((n + 1) / 2))`.
            `"paper"`: each step is clipped before averaging (variance >= 1e-6, sqnorm >= 0). The gain is that of the
            averages over the steps before, at first 1. The averages begin as plain means. Biased low when the noise is
            high: at S=8 and variance/sqnorm = 1000 it gives 7.69, where 7.94 is right.
        smoothing: the averages' factor theta, a number in [0, 1). `"paper"` is `max(1 - S/1000, 0)`. `None` is the
            shorter memory of `"paper"` and 1 % of the run on the clock (`"paper"` where no `total` is given).
        noise_factor: c, positive, a factor on the measured variance. A larger c saves steps and costs quality; the
            bounds and laws of the gain hold for any c. `None` is the optimizer's own: 2 for Adam and AdamW, which need
            fewer steps than Euclidean norms predict (docs/same-training.md), 1 otherwise.
        like: for an unknown optimizer class, the class whose learning rate and decays follow the batch in the same way.
            `torch.optim.Muon` if it normalises after its momentum (Signum, other Muons), `AdamW` or `Adam` if it
            divides by a running size of the gradient, `SGD` if it does neither. The entries of its groups must have
            that class's names. A count `step` in its state or its groups, a tensor or a number, is kept on the clock. A
            step that changes any other number raises.
        exponent: power of the gain that multiplies the learning rate; `None` is the optimizer's own. Alone it is
            enough for an unknown class, whose decays then stay constant.
        consecutive: with one gradient a step (one rank, no accumulation), use this step's and the previous step's as
            the two samples. Costs one copy of the gradient. The change of the expected gradient between two steps
            counts as noise, so the gain is biased upwards where the learning rate is high. The previous gradient is
            not part of the state: the first step after a resume has no new sample.
        metric: the squared norms of the two moments.
            `"euclidean"`: every coordinate has the same weight, as in the paper.
            `"adam"`: a coordinate has Adam's weight, from its debiased second moment v before the step.

                ||g||^2 = sum_i g_i^2 / (sqrt(v_i / (1 - beta2 ** step)) + eps)

            For Adam, AdamW, NAdam and RAdam. The gain is Euclidean in the first 10 steps, and where the v of some
            parameter is younger. Costs a second, weighted read of the gradients and of v for each micro-batch, and
            memory for one parameter at a time. The record has both moments; `noise_scale` and forecasts are Euclidean.
            Rows that seldom get a gradient, such as embeddings of rare words, have a tiny v and a large weight. Many of
            them pull the gain towards S: use `"euclidean"` there.
        every: k: the gradients of each k-th step are measured, by default all. The steps between are almost free and
            have the gain of the averages. The memory of the averages is unchanged, so they hold fewer samples: by the
            steps about 1000 / (S k). A step is also measured where the clock has advanced by a quarter of 1 % of the
            `total`, which leaves four samples. For long runs of small micro-batches (docs/overhead.md). A gradient that
            is not finite is skipped only where it is measured. `"auto"`: a step is measured where the memory of the
            averages would hold fewer than 16 samples otherwise, in steps or on the clock. So are the first 16 steps,
            and the first one after a resume.
        decays: as for every `Rule`.

    Raises:
        InvalidValueError: a value out of range, or `consecutive` with `metric="adam"` or `every`.

    Example:
        >>> anybatch.AdaScale()(scale=16, gain=9.0, clock=anybatch.Clock(), exponent=0.5)
        Scaling(lr_factor=3.0, iterations=9.0)

    Source:
        Johnson et al., AdaScale SGD, ICML 2020, Algorithm 2 and Section 3.4. Qiao et al., Pollux, OSDI 2021, Section
        3.1: the square root for Adam, and the consecutive estimator. Pollux also measures the noise of Adam's
        preconditioned gradient g / sqrt(v); `metric="adam"` is the square root of that preconditioner, derived here.

    Differs from the paper in:
        1. The default estimator clips after averaging, and reaches the full gain step by step instead of after a
           first gain of 1.
        2. The default averages have a horizon on the clock where it is shorter than the paper's in iterations.
        3. S may be fractional or below 1, change at any step, and differ from the number of samples.
        4. Optimizers other than SGD, with their decays on the clock.
        5. `every` measures some of the steps.
        6. `metric="adam"` takes both moments in Adam's own metric, in which its step is a steepest descent.
    """

    measures: ClassVar[bool] = True

    estimator: Estimator = "unbiased"
    smoothing: Smoothing = None
    exponent: float | None = None
    like: type[Optimizer] | None = None
    consecutive: bool = False
    noise_factor: float | None = None
    metric: Literal["euclidean", "adam"] = "euclidean"
    every: int | Literal["auto"] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator not in ("unbiased", "paper"):
            raise InvalidValueError(f'estimator must be "unbiased" or "paper", got {self.estimator!r}.')
        numeric = isinstance(self.smoothing, int | float) and 0 <= self.smoothing < 1
        if self.smoothing is not None and self.smoothing != "paper" and not numeric:
            raise InvalidValueError(f'smoothing must be None, "paper" or in [0, 1), got {self.smoothing!r}.')
        if self.noise_factor is not None and not (isfinite(self.noise_factor) and self.noise_factor > 0):
            raise InvalidValueError(f"noise_factor must be positive and finite, got {self.noise_factor!r}.")
        if self.exponent is not None and not (isfinite(self.exponent) and self.exponent >= 0):
            raise InvalidValueError(f"exponent must be finite and not negative, got {self.exponent!r}.")
        if self.metric not in ("euclidean", "adam"):
            raise InvalidValueError(f'metric must be "euclidean" or "adam", got {self.metric!r}.')
        if self.every != "auto":
            check_steps("every", self.every)
        if self.consecutive and self.every != 1:
            raise InvalidValueError(
                f"consecutive=True compares the gradients of adjacent steps, which every={self.every!r} does not "
                "measure: use one of them."
            )
        if self.metric != "euclidean" and self.consecutive:
            raise InvalidValueError(
                f"consecutive=True compares gradients of two steps by their Euclidean norms, so metric={self.metric!r} "
                "would have no effect: use one of them."
            )

    def __call__(self, *, scale: float, gain: float, clock: Clock, exponent: float) -> Scaling:  # noqa: ARG002
        power = exponent if self.exponent is None else self.exponent
        return Scaling(gain**power, gain)


def measurement_of(rule: Rule) -> AdaScale | None:
    """The options that measure the gain for `rule`: its own, or AdaScale's defaults; `None` where it has no gain."""
    return rule if isinstance(rule, AdaScale) else AdaScale() if rule.measures else None
