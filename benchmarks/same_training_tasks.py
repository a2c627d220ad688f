"""What `same_training` trains: tasks with their optimizers, and one training of any of them.

The digits and the bytes compute a step of S base batches in one vectorised pass; the recipes' tiny tasks train as
`recipes.train` does. Every task has held-out data, and no other: the rate is tuned on what the runs are compared on, by
seeds that are not compared.

A training of a recipe's tiny task takes tens of seconds, so these have shorter runs, fewer candidates and no scale 128;
sentences are translated by greedy search. On the bytes Muon trains all matrices, the embeddings' too, and nothing else.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import anybatch
from anybatch._demo import LAST_RATE, digits, gradients, network
from benchmarks import beyond, forecast
from recipes.train import TASKS as RECIPES
from recipes.train import Options
from recipes.train import run as run_recipe

Point = dict[str, float]
UNCOUNTED = 200  # steps of a run that may be skipped for a gradient that is not finite
Train = Callable[..., "Result"]  # of a Task, a learning rate, a rule, a scale, a seed and the folder of the data


@dataclass(frozen=True)
class Result:
    """One training: its curve of `tau`, `loss` and `metric` on held-out data, and its seconds of one core.

    `diverged` says why a run was given up; it is empty for one that was not.
    """

    steps: int
    diverged: str
    curve: list[Point]
    seconds: float


@dataclass(frozen=True)
class Task:
    """A task with one optimizer.

    Args:
        family: which candidates it has.
        lr: a learning rate near the best of scale 1; it is tuned from there.
        total: base iterations.
        metric: what the metric is called; higher is better.
        train: from this task, the learning rate, the rule, the scale, the seed and the data's folder to a result.
        evaluations: points of the curve.
        candidates: of each scale, where they are not all of the family's.
        seconds: of a run, by scale; an estimate for the plan.
        cheap: whether it is run before the others.
    """

    family: str
    lr: float
    total: int
    metric: str
    train: Train
    evaluations: int = 40
    scales: tuple[int, ...] = (8, 32, 128)
    candidates: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    seconds: Mapping[int, float] = field(default_factory=dict)
    cheap: bool = True

    @property
    def tuning(self) -> int:
        """Seeds of each rate that is tried."""
        return 3 if self.cheap else 2

    def seconds_at(self, scale: int) -> float:
        """Of a run, or of one at the next scale that is known."""
        nearest = min(self.seconds, key=lambda known: abs(known - scale), default=None)
        return self.seconds[nearest] if nearest is not None else 0.0


class ConvNet(nn.Module):
    """Two convolutions and a linear layer over the digits as images of 8 x 8; `[..., 64]` to ten logits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.last = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = torch.relu(self.first(x.unflatten(-1, (1, 8, 8))))
        found: Tensor = self.last(torch.relu(self.second(x)).flatten(1))
        return found


class Signum(Optimizer):
    """A step of lr along the sign of a running mean of the gradients, and decoupled weight decay."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(mean.sign(), alpha=-group["lr"])


def _momentum(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def _adamw(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.1)


def _muon(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.Muon(parameters, lr=lr, weight_decay=0.01)


def _signum(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return Signum(parameters, lr=lr, momentum=0.95, weight_decay=0.01)


CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    "momentum": {
        "constant": {"decays": "constant"},
        "0.33": {"decays": 0.33},
        "clock": {"decays": "clock"},
        "auto": {"decays": "auto"},  # on runs as short as these a power of 1/2, at every scale
    },
    "adam": {
        "euclidean": {"noise_factor": 1.0},
        "noise * 1.5": {"noise_factor": 1.5},
        "noise * 2": {"noise_factor": 2.0},
        "adam": {"metric": "adam"},
    },
    "muon": {"constant": {"decays": "constant"}, "clock": {"decays": "clock"}},
    "signum": {name: {"like": torch.optim.Muon, "decays": name} for name in ("constant", "clock")},
}
OPTIMIZERS = {"momentum": _momentum, "adam": _adamw, "muon": _muon, "signum": _signum}


def trained(net: nn.Module, family: str) -> list[nn.Parameter]:
    """All parameters; for Muon the matrices, and the others stay as they are."""
    if family != "muon":
        return list(net.parameters())
    for p in net.parameters():
        p.requires_grad_(p.dim() == 2)
    return [p for p in net.parameters() if p.requires_grad]


def vectorised(source: beyond.Task) -> Train:
    """The training of a task whose step is one vectorised pass over S base batches."""

    def train(task: Task, lr: float, rule: anybatch.Rule, scale: int, seed: int, _: Path) -> Result:
        start, net = time.process_time(), source.model(seed)
        optimizer = OPTIMIZERS[task.family](trained(net, task.family), lr)
        controller = anybatch.attach(
            optimizer,
            model=net,
            rule=rule,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / task.total)),
            total=task.total,
            base_batch=source.base,
            micro_batch=source.base,
        )
        order, curve, attempts = torch.Generator().manual_seed(seed), [_held_out(net, source, 0.0)], 0
        diverged = ""
        while not controller.done and not diverged:
            attempts += 1
            x, y = source.batch(scale, source.base, order)
            if scale == 1:
                cross_entropy(net(x[0]), y[0]).backward()
            else:
                found = gradients(net, x, y)
                controller.observe([g for g, p in zip(found, net.parameters(), strict=True) if p.requires_grad])
            try:
                optimizer.step()
            except anybatch.DivergedError as error:
                diverged = str(error)
                break
            optimizer.zero_grad()
            if controller.done or controller.clock.reached(len(curve) * task.total / task.evaluations):
                curve.append(_held_out(net, source, controller.tau))
            diverged = _diverged(curve[-1], attempts=attempts, steps=controller.steps, total=task.total)
        controller.detach()
        return Result(controller.steps, diverged, curve, time.process_time() - start)

    return train


def _held_out(net: nn.Module, source: beyond.Task, tau: float) -> Point:
    x, y = _test_set(source)
    with torch.no_grad():
        logits = net(x)
    right = (logits.argmax(1) == y).double().mean().item()
    return {"tau": tau, "loss": cross_entropy(logits, y).item(), "metric": 100 * right}


@cache
def _test_set(source: beyond.Task) -> tuple[Tensor, Tensor]:
    return source.held_out()


def _diverged(last: Point, *, attempts: int, steps: int, total: int) -> str:
    """Why a run is given up; empty while it is not."""
    if not isfinite(last["loss"]):
        return "the loss is not finite"
    if attempts - steps >= UNCOUNTED:
        return f"{attempts - steps} steps were not counted"
    return "more steps than scale 1 takes" if steps > total else ""


def recipe(name: str, **arguments: Any) -> Train:
    """The training of a recipe's tiny task; what its data is made of, `prepare` has written."""

    def train(
        task: Task, lr: float, rule: anybatch.Rule, scale: int, seed: int, data: Path, out: Path | None = None
    ) -> Result:
        module, kind = RECIPES[name].split(":")
        mine = getattr(importlib.import_module(module), kind)(data / name, tiny=True, **arguments)
        start, curve = time.process_time(), list[Point]()

        def watch(tau: float, point: dict[str, Any] | None) -> None:
            if point is not None:
                curve.append({"tau": tau, "loss": point["loss"], "metric": point[mine.metric]})

        options = Options(
            rule=rule, scale=str(scale), lr=lr, seed=seed, total=task.total, evaluations=task.evaluations, out=out
        )
        summary = run_recipe(mine, options, watch=watch)
        diverged = "the loss is not finite" if summary["diverged"] or not isfinite(summary["loss"]) else ""
        return Result(summary["iterations"], diverged, curve, time.process_time() - start)

    return train


def prepare(name: str, data: Path) -> None:
    """Write the made data of a recipe's task, where there is none yet."""
    if name not in MADE:
        return
    folder = data / MADE[name]
    if not (folder.is_dir() and any(folder.iterdir())):
        importlib.import_module(RECIPES[MADE[name]].split(":")[0]).make(folder, size="tiny", seed=0)


_DIGITS = beyond.Task(network, forecast.pictures, lambda: digits()[2:], base=16, total=0)
_SGD_DIGITS = replace(_DIGITS, base=8)
_IMAGES = replace(_DIGITS, model=ConvNet)
_BYTES = beyond.TASKS["bytes"]
SOURCES = {  # of the tasks whose step is one vectorised pass
    "digits-sgd": _SGD_DIGITS,
    **dict.fromkeys(("digits-adamw", "digits-muon", "digits-signum"), _DIGITS),
    **dict.fromkeys(("conv-sgd", "conv-adamw"), _IMAGES),
    **dict.fromkeys(("bytes-adamw", "bytes-muon", "bytes-signum"), _BYTES),
}
_FEW = {8: ("constant", "auto"), 32: ("constant", "clock", "auto")}
_FEWER = {8: ("constant", "auto"), 32: ("constant", "auto")}

TASKS = {
    "digits-sgd": Task(
        "momentum", 0.02, 3000, "accuracy", vectorised(SOURCES["digits-sgd"]), seconds={1: 3, 8: 2, 32: 1, 128: 1}
    ),
    "digits-adamw": Task(
        "adam", 2e-3, 1500, "accuracy", vectorised(SOURCES["digits-adamw"]), seconds={1: 2, 32: 1, 128: 1}
    ),
    "digits-muon": Task(
        "muon", 0.01, 1500, "accuracy", vectorised(SOURCES["digits-muon"]), seconds={1: 4, 32: 1, 128: 1}
    ),
    "digits-signum": Task(
        "signum", 1e-3, 1500, "accuracy", vectorised(SOURCES["digits-signum"]), seconds={1: 2, 32: 1, 128: 1}
    ),
    "conv-sgd": Task(
        "momentum", 0.02, 1500, "accuracy", vectorised(SOURCES["conv-sgd"]), seconds={1: 2, 32: 1, 128: 4}
    ),
    "conv-adamw": Task(
        "adam", 2e-3, 1500, "accuracy", vectorised(SOURCES["conv-adamw"]), seconds={1: 2, 32: 1, 128: 4}
    ),
    "bytes-adamw": Task(
        "adam",
        2e-3,
        2000,
        "accuracy",
        vectorised(SOURCES["bytes-adamw"]),
        40,
        (8, 32, 64),
        seconds={1: 17, 8: 15, 32: 15, 64: 20},
    ),
    "bytes-muon": Task(
        "muon",
        0.01,
        2000,
        "accuracy",
        vectorised(SOURCES["bytes-muon"]),
        40,
        (8, 32, 64),
        seconds={1: 17, 8: 15, 32: 15, 64: 20},
    ),
    "bytes-signum": Task(
        "signum",
        1e-3,
        2000,
        "accuracy",
        vectorised(SOURCES["bytes-signum"]),
        40,
        (8, 32),
        seconds={1: 15, 8: 8, 32: 10},
    ),
    "cifar10-tiny": Task(
        "momentum", 0.05, 1000, "accuracy", recipe("cifar10"), 10, (8, 32), _FEW, {1: 18, 8: 28, 32: 45}, False
    ),
    "yolo-tiny": Task("momentum", 3e-3, 400, "mAP", recipe("yolo"), 8, (8, 32), _FEWER, {1: 28, 8: 55, 32: 110}, False),
    "speech-tiny": Task(
        "momentum", 3e-3, 300, "word accuracy", recipe("speech"), 10, (8, 32), _FEWER, {1: 19, 8: 32, 32: 68}, False
    ),
    "transformer-tiny": Task(
        "momentum", 0.2, 500, "BLEU", recipe("transformer", beam=1), 10, (8, 32), _FEWER, {1: 15, 8: 25, 32: 75}, False
    ),
    "transformer-tiny-adamw": Task(
        "adam",
        2e-3,
        500,
        "BLEU",
        recipe("transformer", beam=1, optimizer="adamw"),
        10,
        (8, 32),
        {8: ("euclidean", "noise * 2", "adam"), 32: ("euclidean", "noise * 2", "adam")},
        {1: 15, 8: 25, 32: 75},
        False,
    ),
}
MADE = {name: name.split("-")[0] for name in TASKS if "-tiny" in name}
