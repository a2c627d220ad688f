"""Is the gain that a run sees the true one? Online against offline, and one run against five with a common gain."""

from bisect import bisect_left
from dataclasses import dataclass, field, fields, replace
from math import isnan
from statistics import fmean
from typing import Any

import torch
from torch import nn

import anybatch
from anybatch._scaling import Moments
from recipes.paper.machine import Machine
from recipes.paper.runs import Run, task_of
from recipes.train import Training
from recipes.training.options import Options
from recipes.training.parallel import here
from recipes.training.task import Task


@dataclass
class Tie:
    """The gain that several trajectories have in common."""

    gain: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Tied(anybatch.AdaScale):
    """AdaScale by a gain that comes from outside: the ratio of moments averaged over trajectories.

    The paper's expectation over all that could have happened: r = E[variance + sqnorm] / E[variance / S + sqnorm].
    """

    tie: Tie = field(default_factory=Tie)

    def __call__(self, *, scale: float, gain: float, clock: anybatch.Clock, exponent: float) -> anybatch.Scaling:  # noqa: ARG002
        """The common gain."""
        return anybatch.Scaling(self.tie.gain**exponent, self.tie.gain)


@dataclass(frozen=True)
class TiedOptions(Options):
    """Options of a tied trajectory."""

    tie: Tie = field(default_factory=Tie)

    def rule_for_attach(self) -> anybatch.Rule:
        """Its rule."""
        return Tied(**_values(super().rule_for_attach()), tie=self.tie)


def compare(base: Run, machine: Machine, *, scale: int, batches: int, points: int, trajectories: int) -> dict[str, Any]:
    """Gains against tau: `online` of one run, `offline` at a few of its points, `tied` of trajectories in step."""
    options = _options(base, machine, scale=scale)
    training = Training(task_of(base), options, here())
    total = training.task.total
    online: list[tuple[float, float]] = []
    offline: list[dict[str, float]] = []
    while not training.over:
        training.step()
        online.append((training.controller.tau, training.controller.gain))
        if training.controller.tau >= len(offline) * total / points + total / (2 * points):
            true = true_moments(training.task, training.net, batches=batches, seed=base.seed + 1)
            offline.append({
                "tau": training.controller.tau,
                "online": training.controller.gain,
                "offline": anybatch.gain(true.variance, true.sqnorm, scale),
                "variance": true.variance,
                "sqnorm": true.sqnorm,
            })  # fmt: skip
    training.close()
    tied = _tied(base, machine, scale=scale, trajectories=trajectories)
    ratios = [point["online"] / point["offline"] for point in offline]
    apart = [abs(_at(online, tau) / gain - 1) for tau, gain in tied if tau > total / 10]
    return {
        "scale": scale,
        "batches": batches,
        "online": online,
        "offline": offline,
        "tied": tied,
        "mean_ratio": fmean(ratios),
        "largest_deviation": max(abs(ratio - 1) for ratio in ratios),
        "largest_tied_deviation": max(apart),
    }


def true_moments(task: Task, net: nn.Module, *, batches: int, seed: int) -> Moments:
    """Moments at the present weights, from the gradients of many base batches; the model stays as it is."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    parameters = [p for p in net.parameters() if p.requires_grad]
    total, squares = [torch.zeros_like(p, dtype=torch.float64) for p in parameters], 0.0
    stream = task.batches(task.base_batch, seed=seed, rank=0, ranks=1)
    for _ in range(batches):
        batch = here().moved(next(stream))
        gradients = torch.autograd.grad(task.loss(net, batch), parameters)  # accumulates nothing, so nothing is counted
        squares += sum(float(g.double().square().sum()) for g in gradients) / batches
        torch._foreach_add_(total, [g.double() for g in gradients])
    for name, buffer in net.named_buffers():
        buffer.copy_(buffers[name])
    square_mean = sum(float((sum_ / batches).square().sum()) for sum_ in total)
    return anybatch.moments(squares, square_mean, sample=1, batch=batches)


def _options(base: Run, machine: Machine, *, scale: int) -> Options:
    one = replace(base, scale=str(scale), evaluations=1)
    return one.options(workers=machine.workers, compile=machine.compile)


def _tied(base: Run, machine: Machine, *, scale: int, trajectories: int) -> list[tuple[float, float]]:
    tie = Tie()
    runs = []
    for seed in range(trajectories):
        alone = _options(replace(base, seed=seed), machine, scale=scale)
        options = TiedOptions(**_values(alone), tie=tie)
        runs.append(Training(task_of(base), options, here()))
    found = []
    while not runs[0].over:
        known = [run.controller for run in runs if not isnan(run.controller.variance)]
        if known:
            variance = fmean(controller.variance for controller in known)
            sqnorm = fmean(controller.sqnorm for controller in known)
            tie.gain = anybatch.gain(variance, sqnorm, scale)
        for run in runs:
            run.step()
        found.append((runs[0].controller.tau, tie.gain))
    for run in runs:
        run.close()
    return found


def _values(given: Any) -> dict[str, Any]:
    return {field_.name: getattr(given, field_.name) for field_ in fields(given)}


def _at(curve: list[tuple[float, float]], tau: float) -> float:
    i = min(bisect_left(curve, (tau, 0.0)), len(curve) - 1)
    return curve[i][1]
