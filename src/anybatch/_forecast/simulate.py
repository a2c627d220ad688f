"""The rule's own estimator, run over curves of the moments: how many steps a whole run takes at a scale."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch._forecast.config import RuleConfig
from anybatch._forecast.curve import Curves
from anybatch._scaling import EPSILON, thetas

_STRIDE = 1000  # steps of a run of more than this are put together
_FIRST = 4  # the first ones never


def simulate(moments: Curves, scales: Sequence[float], *, rule: RuleConfig, on_clock: bool) -> Tensor:
    """Optimizer steps from tau = 0 to the total at each of `scales`, the last one in part: `[scales, versions]`.

    These are `_scaling.Averages`, for many scales and curves at once, so that the memory of the averages and the
    clock's being held for a whole step are in the forecast. Where a run is long, several steps are taken with one gain.

    Args:
        moments: the curves.
        scales: each S, positive.
        rule: whose estimator and smoothing are taken.
        on_clock: whether the run was given a total, so that the averages' horizon is on the clock.
    """
    total, shape = moments.total, (len(scales), len(moments.variance))
    by_clock = on_clock and rule.smoothing is None
    kept = [thetas(rule.smoothing, scale=scale, total=total if on_clock else None) for scale in scales]
    columns = (*zip(*kept, strict=True), scales)
    of_step, of_iteration, scale = (torch.tensor(c, dtype=torch.float64)[:, None] for c in columns)
    variance, sqnorm, weight, tau, steps = torch.zeros(5, *shape, dtype=torch.float64).unbind()
    together = moved = torch.ones(shape, dtype=torch.float64)  # steps and base iterations since the last look
    found = torch.full(shape, torch.nan, dtype=torch.float64)
    samples = 0
    while found.isnan().any():
        keep = torch.minimum(of_step**together, of_iteration**moved)
        prior = _gain(variance / weight, sqnorm / weight, scale, rule=rule)
        raw_variance, raw_sqnorm = moments.at(tau)
        if rule.estimator == "paper":
            raw_variance, raw_sqnorm = raw_variance.clamp(min=EPSILON), raw_sqnorm.clamp(min=0)
            keep = torch.where(samples * (1 - keep) < 1, samples / (samples + 1), keep)
        variance = torch.lerp(raw_variance, variance, keep)
        sqnorm = torch.lerp(raw_sqnorm, sqnorm, keep)
        weight = torch.lerp(torch.ones_like(weight), weight, keep)
        samples += 1
        gain = prior if rule.estimator == "paper" else _gain(variance / weight, sqnorm / weight, scale, rule=rule)
        if rule.estimator == "paper" and samples == 1:
            gain = scale.clamp(max=1).expand(shape)
        if rule.estimator == "unbiased":  # `careful`
            gain = torch.where(gain > 1, gain ** (1 - 2 ** (-(steps + 2) / 2)), gain)
        starting = samples < _FIRST or (not by_clock and samples * (1 - of_step) < 1)
        together = torch.where(torch.as_tensor(starting), 1.0, (total / _STRIDE / gain).floor().clamp(min=1))
        end = (tau + together * gain >= total) & found.isnan()
        found = torch.where(end, steps + (total - tau) / gain, found)
        moved = together * gain
        tau, steps = tau + moved, steps + together
    return torch.where(scale == 1, total, found)


def _gain(variance: Tensor, sqnorm: Tensor, scale: Tensor, *, rule: RuleConfig) -> Tensor:
    """`anybatch.gain`, or the ratio of the paper's recommendation."""
    variance = rule.noise_factor * variance
    if rule.estimator == "ratio":
        ratio = (variance + sqnorm + EPSILON) / (variance / scale + sqnorm + EPSILON)
    else:
        variance, sqnorm = variance.clamp(min=0), sqnorm.clamp(min=0)
        ratio = ((variance + sqnorm) / (variance / scale + sqnorm)).nan_to_num(nan=1.0)
    return torch.minimum(torch.maximum(ratio, scale.clamp(max=1)), scale.clamp(min=1))
