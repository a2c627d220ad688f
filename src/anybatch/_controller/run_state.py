"""RunState: the clock, the averages, the counts and the last step of a run."""

import struct
import time
from collections.abc import Mapping
from math import isnan
from zlib import crc32

from anybatch._controller.ending import Ending
from anybatch._controller.gain_estimator import RunningMoments, Step
from anybatch._record import StepRecord
from anybatch._scaling import BatchSize, Clock


class RunState:
    """The clock, the averages, the counts and the last step of a run; only one that `leads` advances its clock."""

    def __init__(self, *, clock: Clock, batch: BatchSize, shown: bool, leads: bool) -> None:
        self.clock = clock
        self.leads = leads
        self.ending = Ending(clock.total, shown=shown and leads)
        self.batch = batch
        self.running = RunningMoments()
        self.steps = 0
        self.skipped = 0
        self.in_a_row = 0  # skipped steps since the last counted one
        self.last: Step | None = None
        self._time = time.perf_counter()

    def add(self, step: Step, *, skipped: bool) -> None:
        """Count a step; a skipped one changes nothing else."""
        if skipped:
            self.skipped += 1
            self.in_a_row += 1
            return
        self.steps += 1
        self.in_a_row = 0
        self.last = step
        self.running = step.running.moved(step.scaling.iterations)
        try:
            if self.leads:
                self.clock.advance(step.scaling.iterations)
        finally:
            self.ending.at(self.clock)

    def in_words(self, lr: float) -> str:
        """The last step as text for a progress bar; `lr` is the present base learning rate."""
        if self.last is None:
            return ""
        gain = "" if isnan(self.last.gain) else f"gain {self.last.gain:.3g}  "
        return f"{gain}scale {self.last.scale:.4g}  lr {lr * self.last.scaling.lr_factor:.3g}"

    def numbers(self) -> dict[str, float | int]:
        """The numbers that a resumed run needs."""
        return {
            "tau": self.clock.tau,
            "steps": self.steps,
            "skipped": self.skipped,
            **self.running.numbers(),
        }

    def checksum(self, *others: float) -> int:
        """A checksum of 16 bits of the values that must agree over the ranks: clock, averages and `others`."""
        numbers = [self.clock.tau, *self.running.numbers().values(), *others]
        return crc32(struct.pack(f"{len(numbers)}d", *numbers)) >> 16

    def adopt(self, values: Mapping[str, float]) -> None:
        """Continue from the `numbers()` of another run state."""
        self.clock.tau = values["tau"]
        self.steps, self.skipped = int(values["steps"]), int(values["skipped"])
        self.running = RunningMoments.of_numbers(values)
        self.last = None

    @property
    def noise_scale(self) -> float:
        """B_simple of the averages, in examples; in base batches where no base batch was given."""
        return self.running.averages.moments.noise_scale * (self.batch.base_batch or 1.0)

    def line(self, step: Step, *, lr: float, skipped: bool) -> StepRecord:
        """The record's line for the step just added."""
        before, self._time = self._time, time.perf_counter()
        now, metric = self.running.averages.moments, self.running.measured.moments
        return StepRecord(
            step=self.steps,
            tau=self.clock.tau,
            iterations=0.0 if skipped else step.scaling.iterations,
            scale=step.scale,
            count=step.count,
            raw_variance=step.raw.variance,
            raw_sqnorm=step.raw.sqnorm,
            variance=clipped(now.variance),
            sqnorm=clipped(now.sqnorm),
            gain=step.gain,
            lr=lr,
            lr_factor=step.scaling.lr_factor,
            noise_scale=self.noise_scale,
            seconds=self._time - before,
            skipped=skipped,
            metric_variance=clipped(metric.variance),
            metric_sqnorm=clipped(metric.sqnorm),
            per_layer={} if skipped else step.layers,
        )


def clipped(value: float) -> float:
    """`value`, at least 0; nan stays nan."""
    return value if isnan(value) else max(value, 0.0)
