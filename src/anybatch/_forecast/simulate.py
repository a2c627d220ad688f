"""Simulation of a whole run: the rule's estimator along curves of the moments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch._forecast.config import RuleConfig
from anybatch._forecast.curve import Curves
from anybatch._scaling import EPSILON, thetas

_STRIDE = 1000  # a longer run is simulated in about this many updates, of several steps each
_FIRST = 4  # single steps at the start
# Single steps while the averages fill, which the paper's smoothing does in 1000 steps, and in 1000 / S below scale 1.
# After that many (20 below scale 1), an update has a twentieth of the steps so far. This changes a plain mean little
# (the number of steps at scale 0.05 by 4e-4) and limits the updates to a few hundred.
_SINGLE = 1000
_FILLING = 20


def simulate(moments: Curves, scales: Sequence[float], *, rule: RuleConfig, on_clock: bool) -> Tensor:
    """Return the optimizer steps from tau = 0 to the total, with a fractional last step: `[scales, versions]`.

    This is `_scaling.Averages` for many scales and curves at once. So the forecast includes the memory of the averages
    and the clock's constant value within a step. In a long run several steps have one gain.

    Args:
        moments: The curves.
        scales: Each S, positive.
        rule: Its estimator and smoothing are used.
        on_clock: Whether the run had a total, so that the averages' horizon is on the clock.
    """
    total, shape = moments.total, (len(scales), len(moments.variance))
    by_clock = on_clock and rule.smoothing is None
    kept = [thetas(rule.smoothing, scale=scale, total=total if on_clock else None) for scale in scales]
    columns = (*zip(*kept, strict=True), scales)
    of_step, of_iteration, scale = (torch.tensor(c, dtype=torch.float64)[:, None] for c in columns)
    variance, sqnorm, weight, tau, steps = torch.zeros(5, *shape, dtype=torch.float64).unbind()
    together = moved = torch.ones(shape, dtype=torch.float64)  # steps and base iterations of the last update
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
