"""One training of a task of `instead`: by anybatch, or by fixed values in a plain loop without a controller.

A step by fixed values is one backward over the whole batch. A step by anybatch has at most 8 backwards, as on 8
devices. The learning rate falls exponentially to 1 % over the run.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import anybatch
from anybatch._demo import LAST_RATE
from benchmarks.instead_levels import LEVELS
from benchmarks.instead_tasks import TASKS, Task

BACKWARDS = 8  # of a step that is measured, at most
POINTS = 20  # of a curve, at equal shares of the run
PLANNED = (8, 32, 128)  # scales of the forecasts from a record


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        lr: the learning rate that was tuned at scale 1.
        steps: of the whole run, by fixed values; 0 is anybatch.
        factor: on the learning rate, after `kappa`.
        kappa: the optimizer's decays become `decay ** kappa`, with the learning rate of that map.
        warmup: share of the run in which the learning rate rises from scale 1's.
        late: steps with the base batch before the batch becomes S times it.
        record: scale 1 by anybatch with two backwards a step, and forecasts from its record.
        level: a change of anybatch's defaults, of `instead_levels`.
    """

    task: str
    scale: int
    seed: int
    lr: float
    steps: int = 0
    factor: float = 1.0
    kappa: float = 1.0
    warmup: float = 0.0
    late: int = 0
    record: bool = False
    level: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a training came to; `losses` are at equal shares of the run, `gains` maps a scale to gain and steps."""

    steps: int
    examples: float  # in those of scale 1
    losses: list[float]
    metric: float
    seconds: float
    diverged: str = ""
    gains: Mapping[str, list[float]] = field(default_factory=dict)


class _Curve:
    """Held-out losses at equal shares of the run, on straight lines between the points that were computed."""

    def __init__(self, task: Task, net: nn.Module) -> None:
        self.task, self.net, self.metric = task, net, -inf
        self.taus, self.losses = list[float](), list[float]()
        self.see(0.0)

    def see(self, tau: float, *, last: bool = False) -> None:
        """Compute a point where the next share of the run is reached."""
        reached = len(self.taus) * self.task.total / POINTS
        if last or tau >= reached * (1 - 1e-9):
            self.net.eval()
            with torch.no_grad():
                loss, self.metric = self.task.held_out(self.net)
            self.net.train()
            self.taus.append(tau)
            self.losses.append(loss)

    @property
    def finite(self) -> bool:
        return all(map(isfinite, self.losses))

    def points(self) -> list[float]:
        """The losses at 5, 10, ... 100 % of the run; the last is that of the end."""
        grid = np.linspace(0, self.task.total, POINTS + 1)[1:]
        found = np.interp(grid, self.taus, self.losses)
        return [float(f"{x:.4g}") for x in (*found[:-1], self.losses[-1])]


def train(run: Run) -> Outcome:
    """Train once."""
    start, task = time.process_time(), TASKS[run.task]
    net = task.model(run.seed)
    curve = _Curve(task, net)
    optimizers = task.optimizers(net, run.lr)
    gains: dict[str, list[float]] = {}
    if run.steps:
        steps, diverged = run.steps, _fixed(run, task, net, optimizers, curve)
        examples = (run.late + (steps - run.late) * run.scale) / task.total
    else:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "run.jsonl" if run.record else None
            steps, diverged = _measured(run, task, net, optimizers, curve, path)
            if path is not None:
                found = anybatch.forecast(path, PLANNED)
                gains = {f"{s.scale:g}": [s.gain.value, s.steps.value] for s in found.scales}
        examples = steps * run.scale / task.total
    diverged = diverged or ("" if curve.finite else "the loss is not finite")
    points = [] if diverged else curve.points()
    return Outcome(steps, examples, points, curve.metric, time.process_time() - start, diverged, gains)


def _fixed(run: Run, task: Task, net: nn.Module, optimizers: list[Optimizer], curve: _Curve) -> str:
    """A plain loop of `run.steps` steps; says why it was given up."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    first = [group["lr"] for group in groups]
    map_decays(optimizers, run.kappa)
    last = [group["lr"] * run.factor for group in groups]
    order = torch.Generator().manual_seed(run.seed)
    for i in range(run.steps):
        share = i / run.steps
        ramp = min(1.0, share / run.warmup) if run.warmup else 1.0
        for group, low, high in zip(groups, first, last, strict=True):
            group["lr"] = (low + (high - low) * ramp) * LAST_RATE**share
        x, y = task.batch(1, task.base * (1 if i < run.late else run.scale), order)
        task.loss(net(x[0]), y[0]).backward()
        if not _step(task, net, optimizers):
            return "the gradient is not finite"
        curve.see((i + 1) / run.steps * task.total, last=i == run.steps - 1)
        if not curve.finite:
            return "the loss is not finite"
    return ""


def map_decays(optimizers: Sequence[Optimizer], kappa: float) -> None:
    """Put values on the clock for `kappa` base iterations a step: `scale_optimizer`, and SGD's momentum as well.

    For SGD `lr / (1 - m)` is multiplied by kappa, as `scale_optimizer` does with a constant momentum m.
    """
    for optimizer in optimizers if kappa != 1 else ():
        anybatch.scale_optimizer(optimizer, kappa)
        for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
            m = group["momentum"]
            group["momentum"] = m**kappa if m else m
            group["lr"] *= (1 - group["momentum"]) / (1 - m)


def _step(task: Task, net: nn.Module, optimizers: list[Optimizer]) -> bool:
    """Clip, step and clear; `False` where the gradient is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), task.clip) if isfinite(task.clip) else torch.ones(())
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return bool(norm.isfinite())


def _measured(
    run: Run, task: Task, net: nn.Module, optimizers: list[Optimizer], curve: _Curve, record: Path | None
) -> tuple[int, str]:
    """The defaults of anybatch, or a change of them."""
    n = 2 if run.record else min(run.scale, BACKWARDS)
    size = task.base * run.scale // n
    controller = anybatch.attach(
        optimizers,
        model=net,
        rule=LEVELS[run.level].rule,
        scheduler=[torch.optim.lr_scheduler.ExponentialLR(o, LAST_RATE ** (1 / task.total)) for o in optimizers],
        total=task.total,
        base_batch=task.base,
        micro_batch=size,
        record=record,
    )
    LEVELS[run.level].hook(optimizers, run.scale)
    order = torch.Generator().manual_seed(run.seed)
    diverged = ""
    while not controller.done and not diverged:
        x, y = task.batch(n, size, order)
        for part, target in zip(x, y, strict=True):
            (task.loss(net(part), target) / n).backward()
        try:
            _step(task, net, optimizers)
        except anybatch.DivergedError as error:
            diverged = str(error)
        curve.see(controller.tau, last=controller.done)
        if not curve.finite:
            diverged = "the loss is not finite"
    steps = controller.steps
    controller.detach()
    return steps, diverged
