"""GainEstimator: the gain and the scaling of a step from its norms, without process groups or device tensors."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import inf, isfinite, nan
from typing import Any

from anybatch._errors import AnybatchWarning, InvalidValueError
from anybatch._gradients import PAIR, AdamNorms, EuclideanNorms, LayerNorms, Norms, ReducedWindow
from anybatch._numbers import MOST
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
    thetas,
)

_UNKNOWN = Moments(nan, nan)
_NO_STEP = Scaling(1.0, 0.0)
_IN_A_HORIZON = 4  # least number of samples in the averages' memory on the clock, with `every=k`
_KEPT = 16  # the same in both memories, with `every="auto"`
_MEASURED = ("unbiased", "euclidean")  # the noise factors of optimizers were measured with these


@dataclass(frozen=True)
class RunningMoments:
    """The moments averaged over the steps so far: a field for each metric.

    Args:
        averages: of the Euclidean moments.
        metric: of the moments in Adam's metric, since the last gap in their measurement.
    """

    averages: Averages = field(default_factory=Averages, metadata={"probe": EuclideanNorms.name})
    metric: Averages = field(default_factory=Averages, metadata={"probe": AdamNorms.name})

    @classmethod
    def probes(cls) -> dict[str, str]:
        """The field of each probe, by the probe's name, which `AdaScale(metric=...)` has too."""
        return {each.metadata["probe"]: each.name for each in fields(cls)}

    @classmethod
    def prefixes(cls) -> dict[str, str]:
        """How the names of each field's numbers begin in a saved state: the Euclidean ones have no prefix."""
        return {name: "" if name == "averages" else f"{name}_" for name in cls.probes().values()}

    @classmethod
    def of_numbers(cls, values: Mapping[str, float]) -> "RunningMoments":
        """The averages with these `numbers()`."""
        found = {}
        for name, prefix in cls.prefixes().items():
            mine: dict[str, Any] = {each.name: values[prefix + each.name] for each in fields(Averages)}
            found[name] = Averages(**{**mine, "samples": int(mine["samples"]), "age": int(mine["age"])})
        return cls(**found)

    def numbers(self) -> dict[str, float | int]:
        """All numbers by their names in a saved state."""
        return {
            prefix + name: value
            for each, prefix in self.prefixes().items()
            for name, value in vars(getattr(self, each)).items()
        }

    def of_probe(self, name: str) -> Averages:
        """The averages of the moments that the probe of this name measures."""
        found: Averages = getattr(self, self.probes()[name])
        return found

    @property
    def measured(self) -> Averages:
        """The averages in the one metric that is measured beside the Euclidean; empty where none is."""
        return next((each for name, each in vars(self).items() if name != "averages" and each.samples), Averages())

    def moved(self, iterations: float) -> "RunningMoments":
        """The same after the clock has moved by `iterations`."""
        return RunningMoments(**{name: each.moved(iterations) for name, each in vars(self).items()})


@dataclass(frozen=True)
class Step:
    """One step before it happens."""

    scale: float  # S
    count: int  # N; 0 where nothing was counted
    raw: Moments  # of this step alone; nan where it shows none
    running: RunningMoments  # the averages, this step included
    gain: float  # r; nan for a rule that does not measure
    scaling: Scaling  # the rule's result
    skipped: bool = False  # whether the step does not count: its gradient is not finite, or there is none
    layers: Mapping[str, Moments] = field(default_factory=dict)  # `raw` by layer, where it was measured by layer


class GainEstimator:
    """The rule of a run and the measurement of its gain."""

    def __init__(
        self,
        rule: Rule,
        *,
        measurement: AdaScale | None,  # `None` under a rule that does not measure
        batch: BatchSize,
        clock: Clock,
        exponent: Callable[[float], float],  # for a gain, its power that multiplies the optimizer's learning rate
        noise_factor: float,  # the optimizer's own, for a measurement without one
        layers: Callable[[], Sequence[str]] = tuple,  # the names of the layers, in the order of their norms
    ) -> None:
        # A rule that does not support this run raises now.
        _checked(rule, scale=1.0, gain=1.0, clock=clock, exponent=exponent(1.0))
        self._rule = rule
        self._measurement = measurement
        self._batch = batch
        self._clock = clock
        self._exponent = exponent
        self._layers = layers
        if measurement is not None and measurement.noise_factor is not None:
            noise_factor = measurement.noise_factor
        elif measurement is not None and (measurement.estimator, measurement.metric) != _MEASURED:
            noise_factor = 1.0
        self.noise_factor = noise_factor
        self._warned = False
        self._scale = inf  # of the last step; before the first one, each step is measured

    def due(self, running: RunningMoments, *, steps: int) -> bool:
        """Whether the step after `steps` is measured: each k-th, and where the averages would have too few samples."""
        if self._measurement is None:
            return True
        averages, every = running.averages, self._measurement.every
        horizon = horizon_of(self._measurement.smoothing, total=self._clock.total)
        if every == "auto":
            few = averages.samples < _KEPT or _KEPT * averages.iterations >= horizon
            return few or averages.age >= self._spacing(self._measurement, self._scale)
        return steps % every == 0 or _IN_A_HORIZON * averages.iterations >= horizon

    def _spacing(self, measurement: AdaScale, scale: float) -> int:
        """The largest number of steps from one sample to the next, by the memory that is counted in steps."""
        if measurement.every != "auto":
            return measurement.every
        theta, _ = thetas(measurement.smoothing, scale=scale, total=self._clock.total)
        return max(1, int(1 / (_KEPT * max(1 - theta, 1 / MOST))))

    def nothing(self, running: RunningMoments) -> Step:
        """A step without any gradient."""
        return Step(nan, 0, _UNKNOWN, running, nan, _NO_STEP, skipped=True)

    def step(self, running: RunningMoments, seen: ReducedWindow | None) -> Step:
        """The next step, from the windows of all ranks; `seen` is `None` where nothing was counted."""
        if seen is None:
            return self._decide(running, count=0, inverse_sizes=0.0, raw=None)
        if seen.shares.count == 0:
            return self.nothing(running)
        raw, updated = self._fold(running, seen)
        prior = (
            self._measurement is not None and self._measurement.estimator == "paper"
        )  # its gain is of the earlier steps
        step = self._decide(
            running if prior else updated, count=seen.shares.count, inverse_sizes=seen.shares.inverse, raw=raw
        )
        step = replace(step, running=updated, layers=self._by_layer(seen))
        if not seen.finite or (raw is not None and not raw.finite):
            return self.not_finite(step)
        return step

    def not_finite(self, step: Step) -> Step:
        """`step` without its effect, since its gradient is not finite."""
        return replace(step, gain=nan, scaling=_NO_STEP, skipped=True)

    def scaling(self, step: Step, *, exponent: Callable[[float], float]) -> Scaling:
        """The rule's result for `step` and another optimizer, with its own exponent."""
        return _checked(self._rule, scale=step.scale, gain=step.gain, clock=self._clock, exponent=exponent(step.gain))

    def _fold(self, running: RunningMoments, seen: ReducedWindow) -> tuple[Moments | None, RunningMoments]:
        """The Euclidean moments of this step, and the averages, which include them if they are finite and a sample."""
        if self._measurement is None:
            return None, running
        scale, sample = self._sizes(seen)
        raw = self._raw(seen, scale=scale, sample=sample, known=running.averages.samples > 0)
        if raw is None or not raw.finite or not seen.sampled:
            return raw, running
        updated = partial(
            Averages.updated,
            scale=scale,
            smoothing=self._measurement.smoothing,
            estimator=self._measurement.estimator,
            total=self._clock.total,
            every=self._spacing(self._measurement, scale),
        )
        found = {"averages": updated(running.averages, raw)}
        for probe, name in RunningMoments.probes().items():
            if probe != EuclideanNorms.name and probe in seen.norms:
                (weighed,) = self._moments(seen.norms[probe], seen, sample=sample, batch=scale)
                found[name] = updated(running.of_probe(probe), weighed)
        return raw, RunningMoments(**found)

    def _decide(self, running: RunningMoments, *, count: int, inverse_sizes: float, raw: Moments | None) -> Step:
        """The step of `count` micro-batches; 0 where nothing was counted."""
        if count == 0 and self._batch.counts:
            return self.nothing(running)
        scale, _ = self._batch.of_step(count or 1, inverse_sizes)
        self._scale, gain = scale, nan
        if self._measurement is not None:
            weighed = running.of_probe(self._measurement.metric)
            averages = weighed if weighed.samples > 0 else running.averages
            gain = averages.gain(scale, noise_factor=self.noise_factor)
            if self._measurement.estimator == "unbiased":  # the paper starts with r_0 = 1
                gain = careful(gain, running.averages.samples)
        scaling = _checked(self._rule, scale=scale, gain=gain, clock=self._clock, exponent=self._exponent(gain))
        return Step(scale, count, raw or _UNKNOWN, running, gain, scaling)

    def _raw(self, seen: ReducedWindow, *, scale: float, sample: float, known: bool) -> Moments | None:
        """The moments of this step; `None` where it shows no variance."""
        if EuclideanNorms.name in seen.norms:
            (raw,) = self._moments(seen.norms[EuclideanNorms.name], seen, sample=sample, batch=scale)
            return raw
        if PAIR in seen.norms:
            # Two samples of different sizes show the variance of two of their harmonic mean size.
            harmonic = 2 * sample / (1 + seen.pair_inverse_size * seen.shares.count / seen.shares.inverse)
            norms = seen.norms[PAIR]
            mean = nan if norms.mean is None else float(norms.mean)
            return moments(float(norms.samples) / 2, mean, sample=harmonic, batch=2 * harmonic)
        missed = scale != 1 or self._batch.only_measured
        consecutive = self._measurement is not None and self._measurement.consecutive
        if seen.shares.count == 1 and missed and not consecutive and not self._warned:
            self._warned = True
            gain = "the last known one" if known else f"{min(1.0, scale):g}"
            so = "there is no noise scale" if self._batch.only_measured else f"the gain is {gain}"
            warnings.warn(
                f"One gradient a step at scale {scale:g} shows no variance, so {so}. Accumulate over two or more "
                "backwards, split the batch with anybatch.split(batch, 2), or use anybatch.AdaScale(consecutive=True).",
                AnybatchWarning,
                stacklevel=2,
            )
        return None

    def _by_layer(self, seen: ReducedWindow) -> dict[str, Moments]:
        """The Euclidean moments of this step by layer. They are linear in the norms, so their sums are `raw`."""
        if LayerNorms.name not in seen.norms:
            return {}
        scale, sample = self._sizes(seen)
        found = self._moments(seen.norms[LayerNorms.name], seen, sample=sample, batch=scale)
        return dict(zip(self._layers(), found, strict=True))

    def _sizes(self, seen: ReducedWindow) -> tuple[float, float]:
        shares = seen.shares
        return self._batch.of_step(shares.count, shares.inverse, effective=shares.effective)

    def _moments(self, norms: Norms, seen: ReducedWindow, *, sample: float, batch: float) -> list[Moments]:
        """The moments of each part, corrected to draws with replacement."""
        squares, means = (norms.samples / seen.shares.effective).tolist(), norms.mean
        pairs = zip(squares, [] if means is None else means.tolist(), strict=True)
        found = [moments(square, mean, sample=sample, batch=batch) for square, mean in pairs]
        population = self._batch.population
        return found if population is None else [each.with_replacement(population) for each in found]


def _checked(rule: Rule, *, scale: float, gain: float, clock: Clock, exponent: float) -> Scaling:
    """The rule's result, checked before it changes the optimizer."""
    scaling = rule(scale=scale, gain=gain, clock=clock, exponent=exponent)
    if not isinstance(scaling, Scaling):
        raise InvalidValueError(f"{rule} returned {scaling!r}: return an anybatch.Scaling(lr_factor, iterations).")
    factor, iterations = scaling.lr_factor, scaling.iterations
    if not (isfinite(factor) and factor >= 0 and isfinite(iterations) and iterations > 0):
        raise InvalidValueError(
            f"{rule} returned {scaling} at scale {scale:g} with gain {gain:g}: lr_factor must be finite and at least "
            "0, iterations finite and above 0 (decays and step counts are undefined over 0 base iterations)."
        )
    return scaling
