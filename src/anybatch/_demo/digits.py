"""scikit-learn's handwritten digits, trained at many scales with one set of hyperparameters.

`attach` trains a small network by SGD with momentum. The learning rate and its schedule were tuned at the base batch of
8 images, and all other scales use them unchanged.

One rank computes a step of S base batches in one vectorised pass. `torch.func.vmap` of the gradient returns the S
gradients as one tensor per parameter, and `controller.observe` takes them as S micro-batches. A plain loop of S
backwards gives the same moments and weights (tests/test_demo.py), but is slower. Several ranks run that loop under
DistributedDataParallel.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import anybatch

BASE_BATCH = 8
LEARNING_RATE = 0.05
MOMENTUM = 0.9
LAST_RATE = 0.01  # the schedule ends at 1 % of the learning rate
EVALUATIONS = 40

ELASTIC = ((32, 64, 128), (128, 64, 32))
RULES = ("adascale", "lsw", "lsw+")


@dataclass(frozen=True)
class Task:
    """One training run."""

    rule: str  # `"adascale"`, `"lsw"` or `"lsw+"`
    scales: tuple[int, ...]  # the scale, or three: for the first quarter of the run, the second, and the rest
    seed: int  # seed of the weights and the data order
    total: int  # base iterations of the run
    steps: int | None = None  # for `"lsw+"`, the number of steps of the run
    record: str | None = None  # path of the record

    @property
    def name(self) -> str:
        """The scale as text."""
        return "→".join(str(scale) for scale in self.scales)

    def scale_at(self, tau: float) -> int:
        """The scale at `tau`; elastic runs change at a quarter and at half of the run."""
        changes = sum(tau >= share * self.total for share in (0.25, 0.5))
        return self.scales[min(changes, len(self.scales) - 1)]


@dataclass
class Result:
    """The results of a run; the lists are curves at equal steps of tau."""

    task: Task
    iterations: int = 0  # optimizer steps
    accuracy: float = float("nan")  # test accuracy at the end, in percent
    loss: float = float("nan")  # training loss at the end
    mean_gain: float = float("nan")  # tau per iteration in AdaScale's runs, else nan
    tau: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1797 images with standardised pixels, 75 % for training: `(x [n, 64], y [n], x_test, y_test)`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in parts)
    mean, std = x_train.mean(), x_train.std()
    return ((x_train - mean) / std).float(), y_train, ((x_test - mean) / std).float(), y_test


def network(seed: int) -> nn.Sequential:
    """A multilayer perceptron, 64-128-128-10, initialised from `seed`."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def train(task: Task, *, vectorised: bool = True) -> Result:
    """Train once, on all ranks of the process group, and evaluate at equal steps of tau."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    x, y, _, _ = digits()
    net = network(task.seed)
    ddp = DistributedDataParallel(net) if ranks > 1 else None
    model: nn.Module = ddp or net
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / task.total))
    warmup = anybatch.Linear(warmup=0.055, steps=task.steps if task.rule == "lsw+" else None)
    controller = anybatch.attach(
        optimizer,
        model=model,
        rule=anybatch.AdaScale() if task.rule == "adascale" else warmup,
        scheduler=scheduler,
        total=task.total,
        base_batch=BASE_BATCH,
        micro_batch=BASE_BATCH,
        record=task.record,
    )
    result = Result(task)
    evaluate(net, controller, result)
    order = torch.Generator().manual_seed(task.seed)
    while not controller.done:
        scale = task.scale_at(controller.tau)
        rows = torch.randint(len(x), (scale, BASE_BATCH), generator=order)
        if ranks == 1 and vectorised and scale > 1:
            controller.observe(gradients(net, x[rows], y[rows]))
        else:
            # This rank's share of the base batches, or of the one base batch.
            parts = rows.flatten().chunk(ranks)[rank].chunk(max(1, scale // ranks))
            controller.micro_batch = parts[0].numel()
            for i, part in enumerate(parts):
                with ddp.no_sync() if ddp and i < len(parts) - 1 else nullcontext():
                    (cross_entropy(model(x[part]), y[part]) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller.done or controller.clock.reached(len(result.tau) * task.total / EVALUATIONS):
            evaluate(net, controller, result)
    result.iterations = controller.steps
    result.accuracy = result.test_accuracy[-1]
    with torch.no_grad():
        result.loss = cross_entropy(net(x), y).item()
    if task.rule == "adascale":
        result.mean_gain = controller.tau / controller.steps
    controller.detach()
    return result


def train_group(scales: tuple[int, ...], seed: int, *, rules: Sequence[str], total: int, out: Path) -> Iterator[Result]:
    """Train all rules at one scale or elastic sequence from one seed; LSW+ takes AdaScale's number of steps."""
    steps = None
    for rule in sorted(rules, key=RULES.index):
        if rule != "adascale" and (len(scales) > 1 or scales == (1,)):
            continue  # at scale 1 all rules are equal; elastic runs are AdaScale's
        record = out / "records" / f"{rule}-S{'-'.join(map(str, scales))}-seed{seed}.jsonl"
        record.unlink(missing_ok=True)  # else the run would append to an earlier demo's record
        result = train(Task(rule, scales, seed, total, steps=steps, record=str(record)))
        steps = result.iterations if rule == "adascale" else steps
        yield result


def evaluate(net: nn.Module, controller: anybatch.Controller, result: Result) -> None:
    """Add a point to the curves, and to the record."""
    _, _, x, y = digits()
    with torch.no_grad():
        logits = net(x)
        result.tau.append(controller.tau)
        result.test_accuracy.append(100 * (logits.argmax(1) == y).double().mean().item())
        result.test_loss.append(cross_entropy(logits, y).item())
    if result.task.record is not None:
        controller.log(accuracy=result.test_accuracy[-1], loss=result.test_loss[-1])


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradients of S base batches, one tensor `[S, *shape]` a parameter; `x` is `[S, B0, 64]`, `y` `[S, B0]`."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(net, parameters, (x,)), y)

    samples: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return [samples[name] for name in parameters]
