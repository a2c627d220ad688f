"""Diagnostics: warnings and errors for skipped steps, divergence, examples of little worth, and steps after `total`."""

import warnings
from collections.abc import Callable, Sequence
from math import isfinite, isnan

from torch import Tensor
from torch.optim import Optimizer

from anybatch._controller.gain_estimator import Step
from anybatch._controller.run_state import RunState
from anybatch._errors import AnybatchWarning, DivergedError
from anybatch._scaling import bare_optimizer, drivers_of, noise_of_efficiency, scale_of_efficiency

_WARN = 10  # skipped steps in a row before a warning: a GradScaler may need some to find its factor
_RAISE = 100  # skipped steps in a row before an error: the run would never end
_EFFICIENCY = 0.15  # gain / scale below which a step counts as inefficient
_SHARE = 0.2  # of the run in inefficient steps before a warning


class Diagnostics:
    """Warnings and errors of one run; a scheduler of the `undriven` optimizers does not follow the clock."""

    def __init__(
        self, *, run: RunState, parameters: Callable[[], Sequence[Tensor]], undriven: Sequence[Optimizer]
    ) -> None:
        self._run = run
        self._parameters = parameters
        self._undriven = undriven
        self._shown: set[str] = set()
        self._inefficient = (0, 0.0, 0.0)  # inefficient steps: their number, base iterations and base batches

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

    def after(self, step: Step, *, skipped: bool) -> None:
        """Check the run after a step.

        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        if skipped:
            self._check_skipped(step)
        elif isfinite(step.gain) and step.scaling.iterations < _EFFICIENCY * step.scale:
            self._check_efficiency(step)

    def _check_efficiency(self, step: Step) -> None:
        """Warn once when a fifth of the run was in steps that replace less than 15 % of their base batches."""
        steps, iterations, batches = self._inefficient
        steps, iterations, batches = steps + 1, iterations + step.scaling.iterations, batches + step.scale
        self._inefficient = steps, iterations, batches
        total = self._run.clock.total
        if total is None or iterations < _SHARE * total or iterations - step.scaling.iterations >= _SHARE * total:
            return
        scale, efficiency = batches / steps, iterations / batches
        half = scale_of_efficiency(0.5, noise=noise_of_efficiency(efficiency, scale=scale))
        unit = self._run.batch.base_batch
        batch = "" if unit is None else f", a batch of {half * unit:.3g}"
        warnings.warn(
            f"At scale {scale:.4g} an example is worth {efficiency:.1%} of one at the base batch, so far in a fifth of "
            f"the run: it takes {1 / efficiency:.3g} times the examples. The largest scale at which an example is "
            f"worth 50 % is {half:.3g}{batch}. Use a smaller batch, unless steps are all that counts.",
            AnybatchWarning,
            stacklevel=2,
        )

    def _check_skipped(self, step: Step) -> None:
        """Warn after many skipped steps in a row, and raise after too many."""
        n, tau = self._run.in_a_row, self._run.clock.tau
        why = "there was no gradient" if isnan(step.scale) else "the gradient was not finite"
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
