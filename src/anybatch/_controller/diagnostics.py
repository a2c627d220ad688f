"""Diagnostics: warnings and errors for skipped steps, divergence, and steps after `total`."""

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from anybatch._controller.gain_estimator import Step
from anybatch._controller.run_state import RunState
from anybatch._errors import AnybatchWarning, DivergedError
from anybatch._scaling import bare_optimizer, drivers_of

_WARN = 10  # skipped steps in a row before a warning: a GradScaler may take some to find its factor
_RAISE = 100  # and before an error: the run would never end


class Diagnostics:
    """Warnings and errors of one run.

    Args:
        run: the run's state.
        parameters: gives those that are trained.
        undriven: optimizers whose scheduler, if they have one, is not on the clock.
    """

    def __init__(
        self,
        *,
        run: RunState,
        parameters: Callable[[], Sequence[Tensor]],
        undriven: Sequence[Optimizer],
    ) -> None:
        self._run = run
        self._parameters = parameters
        self._undriven = undriven
        self._said: set[str] = set()

    def once(self, text: str) -> None:
        """A warning, the first time."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, AnybatchWarning, stacklevel=2)

    def before(self) -> None:
        """Check the run before a step.

        Raises:
            DivergedError: the weights are not finite.
        """
        run = self._run
        if run.in_a_row and not all(bool(p.isfinite().all()) for p in self._parameters()):
            raise DivergedError(
                f"The weights are not finite after step {run.steps}, at tau = {run.clock.tau:g}: no step will "
                "count now. The learning rate is too high, or a loss not finite: go back to a checkpoint."
            )
        if run.clock.total is not None and run.clock.done:
            self.once(
                f"step() was called after tau reached total={run.clock.total:g}; the schedule has ended too. Train "
                "`while not controller.done`, or pass attach a larger total, in base iterations."
            )
        # At a scale fixed at 1, where the training is only measured, a scheduler comes to its end by itself.
        left = () if run.batch.scale == 1 else self._undriven
        left = [each for each in left if not drivers_of(bare_optimizer(each))]  # a later scheduler may be driven
        if any(hasattr(each.step, "_wrapped_by_lr_sched") for each in left):  # by torch's schedulers
            self.once(
                "This optimizer has a scheduler that was not passed to attach. A large batch takes fewer steps, so a "
                "scheduler that the loop steps does not reach its end. Pass attach(scheduler=...), and do not step it."
            )

    def skipped(self, step: Step) -> None:
        """Count a skipped step.

        Raises:
            DivergedError: too many in a row.
        """
        n, tau = self._run.in_a_row, self._run.clock.tau
        why = "there was no gradient" if step.count == 0 else "the gradient was not finite"
        if n == _WARN:
            warnings.warn(
                f"{n} steps in a row did not count, because {why}: the clock stands at {tau:g}. After "
                f"{_RAISE} of them there is a DivergedError.",
                AnybatchWarning,
                stacklevel=2,
            )
        if n >= _RAISE:
            raise DivergedError(
                f"{n} steps in a row did not count, because {why}: the clock stands at {tau:g}, and the run would "
                "never end. Lower the learning rate, or check the loss for nan and infinity."
            )
