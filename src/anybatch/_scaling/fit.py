"""Whether a schedule was written for the length of the run."""

from math import log10
from typing import Any

from torch.optim import lr_scheduler as torch_schedulers

_TOLERANCE = 0.02  # of the run; schedules are often a warm-up or an epoch short of it
_LOWEST = 1e-8  # a factor on the rate below which no one anneals


def misfit(scheduler: Any, *, length: float) -> str:
    """In what a schedule does not fit a run that ends at its step `length`; empty where it does or nothing is known."""
    for kind, name in _ENDS.items():
        if type(scheduler) is not kind:
            continue
        end = float(getattr(scheduler, name))
        if abs(end - length) > max(_TOLERANCE * length, 1.0):
            return f"{kind.__name__} has {name}={end:g}, the run {length:g} scheduler steps"
    if type(scheduler) is torch_schedulers.MultiStepLR:
        late = sorted(m for m in scheduler.milestones if m > length)
        if late:
            return f"MultiStepLR has a milestone at {late[0]:g}, the run {length:g} scheduler steps"
    factor = _decay(scheduler)
    if factor is not None and 0 < factor[0] < 1 and (log_end := length / factor[1] * log10(factor[0])) < log10(_LOWEST):
        name = type(scheduler).__name__
        return f"{name} ends the run, {length:g} scheduler steps, at 1e{log_end:.0f} of its first rate"
    return ""


# Where the curve has an end: cosine rises again after it, the others stand still, and OneCycleLR raises.
_ENDS = {
    torch_schedulers.CosineAnnealingLR: "T_max",
    torch_schedulers.OneCycleLR: "total_steps",
    torch_schedulers.PolynomialLR: "total_iters",
}


def _decay(scheduler: Any) -> tuple[float, float] | None:
    """The factor on the rate, and the scheduler steps that each takes, of a schedule that multiplies for ever."""
    if type(scheduler) is torch_schedulers.StepLR:
        return scheduler.gamma, scheduler.step_size
    if type(scheduler) is torch_schedulers.ExponentialLR:
        return scheduler.gamma, 1.0
    return None
