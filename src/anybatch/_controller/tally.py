"""Tally: what a run has come to; Readings: what a user and the record read of it."""

import struct
import time
from collections.abc import Mapping
from dataclasses import fields
from math import isnan, nan
from zlib import crc32

from anybatch._controller.judge import Known, Step
from anybatch._gradients import Ranks
from anybatch._record import StepRecord
from anybatch._scaling import Averages, BatchSize, Clock, Rule


class Tally:
    """The clock, the averages, the numbers of steps and the last step."""

    def __init__(self, *, clock: Clock, batch: BatchSize) -> None:
        self.clock = clock
        self.batch = batch
        self.known = Known()
        self.steps = 0
        self.skipped = 0
        self.in_a_row = 0  # steps that did not count since the last that did
        self.last: Step | None = None
        self._time = time.perf_counter()

    @property
    def averages(self) -> Averages:
        """Of the Euclidean moments."""
        return self.known.averages

    def add(self, step: Step, *, skipped: bool) -> None:
        """Count a step that was taken, or that was skipped and leaves everything as it was."""
        if skipped:
            self.skipped += 1
            self.in_a_row += 1
            return
        self.steps += 1
        self.in_a_row = 0
        self.last = step
        self.known = step.known.moved(step.scaling.iterations)
        self.clock.advance(step.scaling.iterations)

    def lap(self) -> float:
        """Seconds since the last call."""
        now, before = time.perf_counter(), self._time
        self._time = now
        return now - before

    def in_words(self, lr: float) -> str:
        """The last step, for a progress bar; `lr` is the base learning rate, which may have moved since."""
        if self.last is None:
            return ""
        gain = "" if isnan(self.last.gain) else f"gain {self.last.gain:.3g}  "
        return f"{gain}scale {self.last.scale:.4g}  lr {lr * self.last.scaling.lr_factor:.3g}"

    def numbers(self) -> dict[str, float | int]:
        """All that a resumed run needs of it."""
        return {
            "tau": self.clock.tau,
            "steps": self.steps,
            "skipped": self.skipped,
            **vars(self.known.averages),
            **{f"metric_{name}": value for name, value in vars(self.known.metric).items()},
        }

    def checksum(self) -> int:
        """20 bits of what must be the same on every rank."""
        numbers = [self.clock.tau, *vars(self.known.averages).values(), *vars(self.known.metric).values()]
        return crc32(struct.pack(f"{len(numbers)}d", *numbers)) >> 12

    def adopt(self, values: Mapping[str, float]) -> None:
        """Go on from another tally's `numbers()`."""
        self.clock.tau = values["tau"]
        self.steps, self.skipped = int(values["steps"]), int(values["skipped"])
        self.known = Known(_averages_of(values, ""), _averages_of(values, "metric_"))
        self.last = None

    @property
    def noise_scale(self) -> float:
        """B_simple of the averages, in examples; in base batches where no base batch was given."""
        return self.averages.moments.noise_scale * (self.batch.base_batch or 1.0)

    def line(self, step: Step, *, lr: float, skipped: bool) -> StepRecord:
        """What the record says of the step just added."""
        now, metric = self.known.averages.moments, self.known.metric.moments
        return StepRecord(
            step=self.steps,
            tau=self.clock.tau,
            iterations=0.0 if skipped else step.scaling.iterations,
            scale=step.scale,
            count=step.count,
            raw_variance=step.raw.variance,
            raw_sqnorm=step.raw.sqnorm,
            variance=_clipped(now.variance),
            sqnorm=_clipped(now.sqnorm),
            gain=step.gain,
            lr=lr,
            lr_factor=step.scaling.lr_factor,
            noise_scale=self.noise_scale,
            seconds=self.lap(),
            skipped=skipped,
            metric_variance=_clipped(metric.variance),
            metric_sqnorm=_clipped(metric.sqnorm),
            per_layer={} if skipped else step.layers,
        )


class Readings:
    """What a user reads of a run; `Controller` has it."""

    _tally: Tally
    _rule: Rule
    _ranks: Ranks

    @property
    def _averages(self) -> Averages:
        return self._tally.averages

    @property
    def rule(self) -> Rule:
        """The rule."""
        return self._rule

    @property
    def ranks(self) -> int:
        """Processes that share each step."""
        return self._ranks.size

    @property
    def clock(self) -> Clock:
        """The clock; subscribe what should move with training."""
        return self._tally.clock

    @property
    def tau(self) -> float:
        """Base iterations done."""
        return self._tally.clock.tau

    @property
    def steps(self) -> int:
        """Steps that happened."""
        return self._tally.steps

    @property
    def skipped(self) -> int:
        """Steps that did not count, because of a gradient that was not finite or not there."""
        return self._tally.skipped

    @property
    def gain(self) -> float:
        """The gain r of the last step; nan before the first, and for rules other than AdaScale."""
        return nan if self._tally.last is None else self._tally.last.gain

    @property
    def scale(self) -> float:
        """S of the last step; nan before the first."""
        return nan if self._tally.last is None else self._tally.last.scale

    @property
    def count(self) -> int:
        """N, the micro-batches on all ranks in the last step; 0 where nothing needed counting."""
        return 0 if self._tally.last is None else self._tally.last.count

    @property
    def lr_factor(self) -> float:
        """The factor that the last step applied to `lr(tau)`."""
        return nan if self._tally.last is None else self._tally.last.scaling.lr_factor

    @property
    def iterations(self) -> float:
        """How far the last step moved the clock, base iterations."""
        return nan if self._tally.last is None else self._tally.last.scaling.iterations

    @property
    def variance(self) -> float:
        """The averaged sigma^2 of one base batch, clipped at 0; nan while unknown."""
        return _clipped(self._averages.moments.variance)

    @property
    def sqnorm(self) -> float:
        """The averaged mu^2, clipped at 0; nan while unknown."""
        return _clipped(self._averages.moments.sqnorm)

    @property
    def noise_scale(self) -> float:
        """B_simple = base_batch * variance / sqnorm, in examples; in base batches where no `base_batch` was given."""
        return self._tally.noise_scale


def _averages_of(values: Mapping[str, float], prefix: str) -> Averages:
    found = {each.name: values[prefix + each.name] for each in fields(Averages)}
    return Averages(**{**found, "samples": int(found["samples"]), "age": int(found["age"])})  # type: ignore[arg-type]


def _clipped(value: float) -> float:
    return value if isnan(value) else max(value, 0.0)
