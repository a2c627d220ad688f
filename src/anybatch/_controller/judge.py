"""Judge: from what a step showed to how far it may go. Numbers in, numbers out; no tensors, no process groups."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite, nan

from anybatch._errors import AnybatchWarning, InvalidValueError
from anybatch._gradients import Observation, SquaredNorms
from anybatch._scaling import (
    AdaScale,
    Averages,
    BatchSize,
    Clock,
    Moments,
    Rule,
    Scaling,
    careful,
    horizon_of,
    moments,
)

_UNKNOWN = Moments(nan, nan)
_NO_STEP = Scaling(1.0, 0.0)
_IN_A_HORIZON = 4  # samples of the moments at least
_MEASURED = ("unbiased", "euclidean")  # with these an optimizer's own noise factor was found


@dataclass(frozen=True)
class Known:
    """What the steps so far have shown; a value, as its averages are.

    Args:
        averages: of the Euclidean moments.
        metric: of the same in Adam's metric, since it was last measured without a gap; empty where it was not.
    """

    averages: Averages = field(default_factory=Averages)
    metric: Averages = field(default_factory=Averages)

    def moved(self, iterations: float) -> "Known":
        """The same after the clock has moved by `iterations`."""
        return Known(self.averages.moved(iterations), self.metric.moved(iterations))


@dataclass(frozen=True)
class Step:
    """What is known of a step before it happens.

    Args:
        scale: S.
        count: N; 0 where nothing was counted.
        raw: the moments that this step alone shows; nan where it shows none.
        known: the averages, this step included.
        gain: r; nan for a rule that does not measure.
        scaling: what the rule says.
        skipped: whether the step does not count, because its gradient is not finite or there is none.
        layers: the same as `raw` by layer, where the step is looked at and shows them.
    """

    scale: float
    count: int
    raw: Moments
    known: Known
    gain: float
    scaling: Scaling
    skipped: bool = False
    layers: Mapping[str, Moments] = field(default_factory=dict)


class Judge:
    """A rule together with what it needs.

    Args:
        rule: the rule.
        batch: how the scale of a step is known.
        clock: the clock.
        exponent: for a gain, the power of it that multiplies the optimizer's learning rate.
        noise_factor: the optimizer's own, where the rule has none.
    """

    def __init__(
        self,
        *,
        rule: Rule,
        batch: BatchSize,
        clock: Clock,
        exponent: Callable[[float], float],
        noise_factor: float,
    ) -> None:
        # A rule that cannot work here says so now.
        _checked(rule, scale=1.0, gain=1.0, clock=clock, exponent=exponent(1.0))
        self._rule = rule
        self._adascale = rule if isinstance(rule, AdaScale) else None
        self._batch = batch
        self._clock = clock
        self._exponent = exponent
        if self._adascale is not None and self._adascale.noise_factor is not None:
            noise_factor = self._adascale.noise_factor
        elif self._adascale is not None and (self._adascale.estimator, self._adascale.metric) != _MEASURED:
            noise_factor = 1.0
        self.noise_factor = noise_factor
        self._warned = False

    def in_turn(self, steps: int) -> bool:
        """Whether the step after `steps` is measured in any case."""
        return self._adascale is None or steps % self._adascale.every == 0

    def overdue(self, known: Known) -> bool:
        """Whether the averages' memory wants a sample now."""
        if self._adascale is None:
            return False
        horizon = horizon_of(self._adascale.smoothing, total=self._clock.total)
        return _IN_A_HORIZON * known.averages.iterations >= horizon

    def nothing(self, known: Known) -> Step:
        """A step without any gradient."""
        return Step(nan, 0, _UNKNOWN, known, nan, _NO_STEP, skipped=True)

    def step(self, known: Known, seen: Observation | None) -> Step:
        """The coming step, from what all ranks saw of it; `None` where nothing was counted."""
        if seen is None:
            return self.decide(known, count=0, inverse_sizes=0.0)
        if seen.shares.count == 0:
            return self.nothing(known)
        raw, folded = self.fold(known, seen)
        prior = self._adascale is not None and self._adascale.estimator == "paper"  # its gain is of the steps before
        step = self.decide(
            known if prior else folded, count=seen.shares.count, inverse_sizes=seen.shares.inverse, raw=raw
        )
        step = replace(step, known=folded, layers=self.layers(seen))
        if raw is not None and not raw.finite:
            return replace(step, gain=nan, scaling=_NO_STEP, skipped=True)
        return step

    def fold(self, known: Known, seen: Observation, *, ago: float = 0.0) -> tuple[Moments | None, Known]:
        """The Euclidean moments that `seen` alone shows, and the averages with all that it shows, if that is finite.

        Averages forget by what the clock moved between two samples, so one that was taken `ago` base iterations before
        now is folded in as of then.
        """
        if self._adascale is None or seen.shares.count == 0:
            return None, known
        shares = seen.shares
        scale, sample = self._batch.of_step(shares.count, shares.inverse, effective=shares.effective)
        raw = self._raw(seen, scale=scale, sample=sample, known=known.averages.samples > 0)
        if raw is None or not raw.finite:
            return raw, known
        updated = partial(
            Averages.updated,
            scale=scale,
            smoothing=self._adascale.smoothing,
            estimator=self._adascale.estimator,
            total=self._clock.total,
            every=self._adascale.every,
        )
        metric = Averages()
        if seen.weighed is not None:
            raw_metric = self._with_replacement(_moments_of(seen.weighed, sample=sample, batch=scale))
            metric = updated(known.metric.moved(-ago), raw_metric)
        return raw, Known(updated(known.averages.moved(-ago), raw), metric).moved(ago)

    def layers(self, seen: Observation) -> dict[str, Moments]:
        """The Euclidean moments that `seen` alone shows, by layer: they are linear in the norms, so they add up."""
        if not seen.layers:
            return {}
        shares = seen.shares
        scale, sample = self._batch.of_step(shares.count, shares.inverse, effective=shares.effective)
        return {
            name: self._with_replacement(_moments_of(norms, sample=sample, batch=scale))
            for name, norms in seen.layers.items()
        }

    def decide(self, known: Known, *, count: int, inverse_sizes: float, raw: Moments | None = None) -> Step:
        """The step of `count` micro-batches, from `known`; 0 where the scale is a number and nothing was counted."""
        if count == 0 and self._batch.counts:
            return self.nothing(known)
        scale, _ = self._batch.of_step(count or 1, inverse_sizes)
        gain = nan
        if self._adascale is not None:
            weighed = self._adascale.metric == "adam" and known.metric.samples > 0
            averages = known.metric if weighed else known.averages
            gain = averages.gain(scale, noise_factor=self.noise_factor)
            if self._adascale.estimator == "unbiased":  # the paper starts with r_0 = 1
                gain = careful(gain, known.averages.samples)
        scaling = _checked(self._rule, scale=scale, gain=gain, clock=self._clock, exponent=self._exponent(gain))
        return Step(scale, count, raw or _UNKNOWN, known, gain, scaling)

    def scaling(self, step: Step, *, exponent: Callable[[float], float]) -> Scaling:
        """What the rule says of `step` for another optimizer, whose rate has this power of the gain."""
        return _checked(self._rule, scale=step.scale, gain=step.gain, clock=self._clock, exponent=exponent(step.gain))

    def _raw(self, seen: Observation, *, scale: float, sample: float, known: bool) -> Moments | None:
        """This step's own moments; `None` where it shows no variance."""
        if seen.norms is not None:
            raw = _moments_of(seen.norms, sample=sample, batch=scale)
            return self._with_replacement(raw)
        if seen.pair is not None:
            return _moments_of(seen.pair, sample=sample, batch=2 * sample)
        consecutive = self._adascale is not None and self._adascale.consecutive
        missed = scale != 1 or self._batch.only_measured
        if seen.shares.count == 1 and missed and not consecutive and not self._warned:
            self._warned = True
            gain = "the last one known" if known else f"{min(1.0, scale):g}"
            so = "there is no noise scale" if self._batch.only_measured else f"the gain is {gain}"
            warnings.warn(
                f"One gradient a step at scale {scale:g} shows no variance, so {so}. Accumulate over two "
                "or more backwards, cut the batch with anybatch.split(batch, 2), or use "
                "anybatch.AdaScale(consecutive=True).",
                AnybatchWarning,
                stacklevel=2,
            )
        return None

    def _with_replacement(self, raw: Moments) -> Moments:
        population = self._batch.population
        return raw if population is None else raw.with_replacement(population)


def _checked(rule: Rule, *, scale: float, gain: float, clock: Clock, exponent: float) -> Scaling:
    """What the rule says, before anything of the optimizer is changed by it."""
    said = rule(scale=scale, gain=gain, clock=clock, exponent=exponent)
    if not isinstance(said, Scaling):
        raise InvalidValueError(f"{rule} returned {said!r}: a rule returns an anybatch.Scaling(lr_factor, iterations).")
    if not (isfinite(said.lr_factor) and said.lr_factor >= 0 and isfinite(said.iterations) and said.iterations > 0):
        raise InvalidValueError(
            f"{rule} returned {said} at scale {scale:g} with gain {gain:g}: lr_factor must be finite and at least 0, "
            "iterations finite and above 0 (by 0 base iterations no decay and no step count can be told)."
        )
    return said


def _moments_of(norms: SquaredNorms, *, sample: float, batch: float) -> Moments:
    return moments(norms.mean_square, norms.square_mean, sample=sample, batch=batch)
