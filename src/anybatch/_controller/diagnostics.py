"""Diagnostics: warnings and errors for skipped steps, divergence, and steps after `total`."""

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from anybatch._controller.gain_estimator import Step
from anybatch._controller.run_state import RunState
from anybatch._errors import AnybatchWarning, DivergedError
from anybatch._scaling import bare_optimizer, drivers_of

_WARN = 10  # skipped steps in a row before a warning: a GradScaler may need some to find its factor
_RAISE = 100  # skipped steps in a row before an error: the run would never end


class Diagnostics:
    """Warnings and errors of one run; a scheduler of the `undriven` optimizers does not follow the clock."""

    def __init__(
        self, *, run: RunState, parameters: Callable[[], Sequence[Tensor]], undriven: Sequence[Optimizer]
    ) -> None:
        self._run = run
        self._parameters = parameters
        self._undriven = undriven
        self._shown: set[str] = set()

    def once(self, text: str) -> None:
        """Show a warning the first time."""
        if text not in self._shown:
            self._shown.add(text)
            warnings.warn(text, AnybatchWarning, stacklevel=2)

    def before(self) -> None:
        """Check the run before a step.

        Raises:
            DivergedError: the weights are not finite.
        """
        run = self._run
        if run.in_a_row and not all(bool(p.isfinite().all()) for p in self._parameters()):
            after = f"after step {run.steps}, at tau = {run.clock.tau:g}" if run.steps else "before the first step"
            why = (
                "The learning rate is too high, or a loss is not finite: load a checkpoint."
                if run.steps
                else "No step has changed them: check the initialisation, or the checkpoint that was loaded."
            )
            raise DivergedError(f"The weights are not finite {after}, so no further step counts. {why}")
        if run.leads and run.clock.total is not None and run.clock.done:
            self.once(
                f"step() was called after tau reached total={run.clock.total:g}; the schedule has ended too. Train "
                "`while not controller.done`, or pass attach a larger total, in base iterations."
            )
        # At a fixed scale of 1 the training is only measured, and a scheduler reaches its end in the loop.
        undriven = () if run.batch.scale == 1 else self._undriven
        undriven = [each for each in undriven if not drivers_of(bare_optimizer(each))]  # one may be driven since
        if any(hasattr(each.step, "_wrapped_by_lr_sched") for each in undriven):  # by torch's schedulers
            self.once(
                "This optimizer has a scheduler that was not passed to attach. A large batch takes fewer steps, so a "
                "scheduler that the loop steps does not reach its end. Pass attach(scheduler=...), and do not step it."
            )

    def skipped(self, step: Step) -> None:
        """Warn after many skipped steps in a row, and raise a `DivergedError` after too many."""
        n, tau = self._run.in_a_row, self._run.clock.tau
        why = "there was no gradient" if step.count == 0 else "the gradient was not finite"
        if n == _WARN:
            warnings.warn(
                f"{n} steps in a row did not count, because {why}: the clock stays at {tau:g}. After {_RAISE} of them "
                "a DivergedError is raised.",
                AnybatchWarning,
                stacklevel=2,
            )
        if n >= _RAISE:
            raise DivergedError(
                f"{n} steps in a row did not count, because {why}: the clock stays at {tau:g}, and the run would "
                "never end. Lower the learning rate, or check the loss for nan and infinity."
            )
