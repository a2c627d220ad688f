"""Complaints: what a run is told when its steps come to nothing, or should come to an end."""

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from anybatch._controller.judge import Step
from anybatch._controller.tally import Tally
from anybatch._errors import AnybatchWarning, DivergedError
from anybatch._scaling import bare_optimizer, drivers_of

_PATIENT = 10  # steps in a row that do not count before a warning: a GradScaler may take some to find its factor


class Complaints:
    """Those of one run.

    Args:
        tally: what it has come to.
        patience: steps in a row that may not count.
        parameters: gives those that are trained.
        undriven: optimizers whose scheduler, if they have one, nobody keeps on the clock.
    """

    def __init__(
        self,
        *,
        tally: Tally,
        patience: int,
        parameters: Callable[[], Sequence[Tensor]],
        undriven: Sequence[Optimizer],
    ) -> None:
        self._tally = tally
        self._patience = patience
        self._parameters = parameters
        self._undriven = undriven
        self._said: set[str] = set()

    def once(self, text: str) -> None:
        """A warning, the first time."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, AnybatchWarning, stacklevel=2)

    def before(self) -> None:
        """A step comes: whether the run still goes somewhere, and whether it should.

        Raises:
            DivergedError: the weights are not finite.
        """
        tally = self._tally
        if tally.in_a_row and not all(bool(p.isfinite().all()) for p in self._parameters()):
            raise DivergedError(
                f"The weights are not finite after step {tally.steps}, at tau = {tally.clock.tau:g}: no step will "
                "count now. The learning rate is too high, or a loss not finite: go back to a checkpoint."
            )
        if tally.clock.total is not None and tally.clock.done:
            self.once(
                "A step after the end: the clock has reached total, and the schedule with it. Train `while not "
                "controller.done`, or give attach the total, in base iterations, that is meant."
            )
        # At a scale fixed at 1, where the training is only measured, a scheduler comes to its end by itself.
        left = () if tally.batch.scale == 1 else self._undriven
        left = [each for each in left if not drivers_of(bare_optimizer(each))]  # a later scheduler may be driven
        if any(hasattr(each.step, "_wrapped_by_lr_sched") for each in left):  # by torch's schedulers
            self.once(
                "This optimizer has a scheduler that attach was not given: a large batch takes fewer steps, so stepped "
                "by the loop it does not come to its end. Give attach(scheduler=...), and do not step it."
            )

    def skipped(self, step: Step) -> None:
        """A step did not count.

        Raises:
            DivergedError: too many in a row.
        """
        n, tau = self._tally.in_a_row, self._tally.clock.tau
        why = "there was no gradient" if step.count == 0 else "the gradient was not finite"
        if n == _PATIENT:
            warnings.warn(
                f"{n} steps in a row did not count, because {why}: the clock stands at {tau:g}. After "
                f"{self._patience} of them there is a DivergedError.",
                AnybatchWarning,
                stacklevel=2,
            )
        if n >= self._patience:
            raise DivergedError(
                f"{n} steps in a row did not count, because {why}: the clock stands at {tau:g}, and the run would "
                "never end. Lower the learning rate, or look at the loss; attach(patience=...) is the number of them "
                "that may be."
            )
