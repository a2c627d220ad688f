"""Limits of Lightning's loops, in base iterations."""

import warnings
from contextlib import ExitStack
from math import ceil

from lightning.pytorch import Trainer

import anybatch


class Limits:
    """Replaces a Trainer's limits, from `take` to `release`."""

    def __init__(self, base_batch: float, examples: float | None) -> None:
        self._base_batch, self._examples = base_batch, examples
        self._own = ExitStack()

    def take(self, trainer: Trainer) -> float:
        """Set Lightning's limits to the run's length in base iterations, and return this length."""
        fit, steps = trainer.fit_loop, trainer.fit_loop.epoch_loop
        short = trainer.fast_dev_run  # type: ignore[attr-defined]  # a few steps; its one epoch is no limit
        total = self._total(fit.max_steps, -1 if short else fit.max_epochs)
        for loop, name in ((fit, "max_epochs"), (fit, "min_epochs"), (steps, "max_steps"), (steps, "min_steps")):
            self._own.callback(setattr, loop, name, getattr(loop, name))
        if fit.min_epochs or steps.min_steps:
            warnings.warn(
                f"The run ends at tau = {total:g}. The Trainer's min_epochs and min_steps are ignored, since they "
                "would train beyond the end of the schedule: remove them.",
                anybatch.AnybatchWarning,
                stacklevel=3,
            )
        fit.max_epochs, fit.min_epochs, steps.max_steps, steps.min_steps = -1, 0, ceil(total), None
        return total

    def release(self) -> None:
        """Restore the Trainer's limits."""
        self._own.close()

    def epoch(self, wanted: str) -> float:
        """Base iterations of a pass over the data; `wanted` names the setting that needs them."""
        if self._examples is None:
            raise anybatch.UsageError(
                f"{wanted} counts epochs, of unknown length: give AnyBatch(examples=len(data)). Or count in base "
                'iterations: Trainer(max_steps=T), and {"scheduler": ..., "interval": "step"} for schedulers, whose '
                "interval is an epoch by default."
            )
        return self._examples / self._base_batch

    def _total(self, max_steps: int, max_epochs: int | None) -> float:
        limits = [] if max_steps == -1 else [float(max_steps)]
        if max_epochs is not None and max_epochs != -1:
            limits.append(max_epochs * self.epoch("Trainer(max_epochs=...)"))
        if not limits:
            raise anybatch.UsageError("The run has no end: give Trainer(max_steps=T), T in base iterations.")
        return min(limits)
