"""The rule's own estimator, run over curves of the moments: how many steps a whole run takes at a scale."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch._forecast.config import RuleConfig
from anybatch._forecast.curve import Curves
from anybatch._scaling import EPSILON, thetas

_STRIDE = 1000  # steps of a run of more than this are put together
_FIRST = 4  # the first ones never
# While the averages fill, steps are taken one by one: from scale 1 on that is at most 1000 of them by the paper's.
# Below, where it is 1000 / S, and for a longer memory of one's own, a twentieth of those taken so far is put together,
# which moves a plain mean little (the steps at scale 0.05 by 4e-4): a few hundred looks whatever the scale.
_SINGLE = 1000
_FILLING = 20


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
    single = torch.where(scale < 1, _FILLING, _SINGLE)
    samples, share = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    while found.isnan().any():
        keep = torch.minimum(of_step**together, of_iteration**moved)
        prior = _gain(variance / weight, sqnorm / weight, scale, rule=rule)
        raw_variance, raw_sqnorm = moments.at(tau)
        if rule.estimator == "paper":
            raw_variance, raw_sqnorm = raw_variance.clamp(min=EPSILON), raw_sqnorm.clamp(min=0)
            keep = torch.where(samples * (1 - keep) < share, samples / (samples + share), keep)
        variance = torch.lerp(raw_variance, variance, keep)
        sqnorm = torch.lerp(raw_sqnorm, sqnorm, keep)
        weight = torch.lerp(torch.ones_like(weight), weight, keep)
        samples = samples + share
        gain = prior if rule.estimator == "paper" else _gain(variance / weight, sqnorm / weight, scale, rule=rule)
        if rule.estimator == "paper":
            gain = torch.where(samples == 1, scale.clamp(max=1), gain)
        if rule.estimator == "unbiased":  # `careful`
            gain = torch.where(gain > 1, gain ** (1 - 2 ** (-(steps + 2) / 2)), gain)
        starting = (samples < _FIRST) | ((not by_clock) & (samples * (1 - of_step) < 1))
        together = (total / _STRIDE / gain).floor().clamp(min=1)
        filling = torch.where(samples < single, 1.0, (samples / _FILLING).floor())
        together = torch.where(starting, torch.minimum(filling, together), together)
        share = torch.where(starting, together, 1.0)
        end = (tau + together * gain >= total) & found.isnan()
        found = torch.where(end, steps + (total - tau) / gain, found)
        moved = together * gain
        tau, steps = tau + moved, steps + together
    return torch.where(scale == 1, total, found)


def _gain(variance: Tensor, sqnorm: Tensor, scale: Tensor, *, rule: RuleConfig) -> Tensor:
    """`anybatch.gain`."""
    variance, sqnorm = (rule.noise_factor * variance).clamp(min=0), sqnorm.clamp(min=0)
    ratio = ((variance + sqnorm) / (variance / scale + sqnorm)).nan_to_num(nan=1.0)
    return torch.minimum(torch.maximum(ratio, scale.clamp(max=1)), scale.clamp(min=1))
