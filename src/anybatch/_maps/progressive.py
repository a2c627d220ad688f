"""Progressive scaling: another batch from chosen points of the clock on, and all that hangs on the batch with it."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from anybatch._errors import InvalidValueError, UsageError
from anybatch._maps.maps import BetasRule
from anybatch._maps.rescale import check_free, rescale
from anybatch._numbers import positive, real, shown
from anybatch._scaling import Clock, ScheduleDriver, position_of

# In the parameter groups, so that it is saved and loaded together with the values that it speaks of.
_MARK = "anybatch_scale"


class Progressive:
    """The scale of the batch as a function of tau, constant between chosen points.

        scale(tau) = scales[largest start <= tau]

    With a controller, accumulate `scale(controller.tau)` times: it counts what happens, and learning rate, schedule and
    averages follow. Without one, `apply` edits the optimizer by the maps of `scale_hyperparameters`.

    Args:
        scales: start, in base iterations, to scale, batch / base batch; one start is 0.

    Raises:
        InvalidValueError: no start at 0, a negative one, or a scale that is not positive.

    Example:
        >>> progressive = anybatch.Progressive({0: 1, 20: 4})
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> clock, steps = anybatch.Clock(total=60), 0
        >>> while not clock.done:
        ...     scale = progressive.apply(optimizer, clock=clock)      # a batch of 256 * scale
        ...     optimizer.step()
        ...     clock.advance(scale)                                   # ModelEMA(clock=clock) follows
        ...     steps += 1
        >>> steps, optimizer.param_groups[0]["lr"]
        (30, 0.4)

    Source:
        Busbridge et al., How to Scale Your EMA, NeurIPS 2023 (progressive scaling).

    Differs from the paper in:
        1. The points are on the clock, not in epochs; a schedule given to `apply` is at floor(tau).
    """

    def __init__(self, scales: Mapping[float, float]) -> None:
        if not isinstance(scales, Mapping):
            raise InvalidValueError(f"scales maps starts to scales, such as {{0: 1, 20: 4}}; got {shown(scales)}.")
        for start, scale in scales.items():
            if positive(scale) is None:
                raise InvalidValueError(f"A scale is batch / base batch, positive and finite; got {shown(scale)}.")
            tau = real(start)
            if tau is None or tau < 0:
                raise InvalidValueError(f"A start is a number of base iterations, at least 0; got {shown(start)}.")
        if 0 not in scales:
            raise InvalidValueError(f"scales needs a start at 0, got {sorted(scales)}.")
        self.scales: dict[float, float] = dict(sorted(scales.items()))

    def scale(self, tau: float) -> float:
        """The scale at `tau`, base iterations, up to the rounding of a long sum.

        Raises:
            InvalidValueError: `tau` is negative, or no finite number.
        """
        now = real(tau)
        if now is None or now < 0:
            raise InvalidValueError(f"tau is a number of base iterations, at least 0; got {shown(tau)}.")
        clock = Clock()
        clock.tau = now
        return float(next(s for start, s in reversed(self.scales.items()) if clock.reached(start)))

    def apply(
        self, optimizer: Optimizer, *, clock: Clock, scheduler: Any = None, betas_rule: BetasRule = "power"
    ) -> float:
        """Bring an optimizer without a controller to the scale at `clock.tau`; call it before every step.

        It changes something only where the scale changes or the schedule moves. What scale an optimizer is at stands in
        its parameter groups, so resuming needs no more than its own state, the scheduler's, and `clock.tau`. A group
        added later is at the base batch, and joins.

        Args:
            optimizer: as tuned at the base batch when this first sees it.
            clock: to be advanced by the returned scale after each step that happened.
            scheduler: a torch scheduler written for the base batch; it is stepped here, to `floor(tau)`, and always
                sees the base values.
            betas_rule: as in `scale_hyperparameters`.

        Returns:
            The scale, batch / base batch, of the coming step.

        Raises:
            UsageError: the optimizer has a controller, or it comes without its mark in mid-run.
            InvalidValueError: the scheduler does not tell where it is; a beta out of range.
        """
        check_free(optimizer)
        _check_marks(optimizer, clock)
        groups, scale = optimizer.param_groups, self.scale(clock.tau)
        marks = [group.get(_MARK, 1.0) for group in groups]
        rescale(optimizer, [scale / mark for mark in marks], betas_rule=betas_rule)  # all, or an error and nothing
        for group in groups:
            group[_MARK] = scale
        steps = 0 if scheduler is None else clock.iteration - _known_position(scheduler)
        if steps > 0:
            rescale(optimizer, [1 / scale] * len(groups), betas_rule=betas_rule, state=False)
            try:
                _drive(scheduler, optimizer, steps)
            finally:
                rescale(optimizer, [scale] * len(groups), betas_rule=betas_rule, state=False)
        return scale


def check_base(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose values are not those of the base batch.

    Raises:
        UsageError: `Progressive.apply` has scaled it.
    """
    marks = {float(group.get(_MARK, 1)) for group in optimizer.param_groups}
    if marks - {1.0}:
        raise UsageError(
            f"Progressive.apply has scaled this optimizer's values already, by {sorted(marks)}, and a controller would "
            "scale them again: attach to an optimizer with the values of the base batch, and let Progressive.scale "
            "say how often to accumulate."
        )


def _check_marks(optimizer: Optimizer, clock: Clock) -> None:
    if clock.tau > 0 and not any(_MARK in group for group in optimizer.param_groups):
        raise UsageError(
            f"The clock is at {clock.tau:g}, and the optimizer does not say for which scale its values are: call apply "
            f'before the first step, and once before a flattened state is loaded; or set group["{_MARK}"] yourself, 1 '
            "for the base batch."
        )


def _known_position(scheduler: Any) -> int:
    position = position_of(scheduler)
    if position is None:
        raise InvalidValueError(f"{type(scheduler).__name__} has no last_epoch, so where it is cannot be known.")
    return position


def _drive(scheduler: Any, optimizer: Optimizer, steps: int) -> None:
    """Step it so often, but not beyond an end of its own."""
    clock = Clock()
    driver = ScheduleDriver(scheduler, optimizer=optimizer, clock=clock)
    with warnings.catch_warnings():
        # Right after a resume it moves before the optimizer's first step in this process: torch warns of that order.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")
        clock.advance(steps)
    driver.stop()
