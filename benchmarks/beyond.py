"""Beyond the paper's table: below the base batch, other optimizers, and decays on the clock against constant ones.

    python -m benchmarks.beyond [--seeds 5] [--tasks digits,bytes] [--json docs/reproduction/beyond.json]

Two tasks, the digits and a small byte-level language model; the learning rate decays exponentially to 1 %. Every line
is compared with scale 1 by a Welch test on the test loss: `-` is significantly worse, `+` significantly better
(two-sided, 0.95); a line without a mark is no finding.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import ttest_ind
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import anybatch
from anybatch._demo import LAST_RATE, digits, gradients, network
from benchmarks import forecast


@dataclass(frozen=True)
class Task:
    """Data, model and length; `held_out` is the test set."""

    model: Callable[[int], nn.Module]
    batch: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    held_out: Callable[[], tuple[Tensor, Tensor]]
    base: int
    total: int


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    task: str
    optimizer: str
    scale: float
    decays: str
    rule: str = "adascale"


def _first_passages(scale: int, base: int, order: torch.Generator) -> tuple[Tensor, Tensor]:
    """From the first nine tenths of the text; the rest is held out."""
    return forecast.passages(scale, base, order, until=9 * len(forecast.text()) // 10)


def _last_passages() -> tuple[Tensor, Tensor]:
    whole = forecast.text()
    start = torch.arange(9 * len(whole) // 10, len(whole) - forecast.CONTEXT - 1, forecast.CONTEXT)
    found = whole[start[:, None] + torch.arange(forecast.CONTEXT + 1)]
    return found[:, :-1], found[:, 1:].flatten()


TASKS = {
    "digits": Task(network, forecast.pictures, lambda: digits()[2:], base=16, total=2000),
    "bytes": Task(forecast.Gpt, _first_passages, _last_passages, base=4, total=1000),
}


def _muon(net: nn.Module) -> torch.optim.Optimizer:
    """Muon on the digits' matrices; it takes no biases, which stay as they are."""
    return torch.optim.Muon([p for p in net.parameters() if p.dim() == 2], lr=0.01, weight_decay=0.01)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.05),
    "SGD, momentum .9": lambda net: torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9),
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99)),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.1),
    "Muon": _muon,
}


def cases(tasks: list[str]) -> Iterator[Case]:
    """Scale 1 of each optimizer first, then what is compared with it."""
    for task in tasks:
        optimizers = list(OPTIMIZERS) if task == "digits" else ["AdamW"]
        for optimizer in optimizers:
            fixed = optimizer in ("SGD", "Muon")  # no decay of theirs goes on the clock
            yield Case(task, optimizer, 1, "constant", "identity")
            if task == "digits":
                yield Case(task, optimizer, 1 / 4, "clock" if not fixed else "constant")
                yield Case(task, optimizer, 1 / 8, "clock" if not fixed else "constant")
            for scale in (8, 32):
                for decays in ("constant",) if fixed else ("clock", "constant"):
                    yield Case(task, optimizer, scale, decays)
                if not fixed and optimizer.startswith("Adam"):
                    yield Case(task, optimizer, scale, "clock", "square root")


def train(case: Case, seed: int) -> dict[str, float]:
    """One run: steps and final test loss."""
    task = TASKS[case.task]
    net = task.model(seed)
    optimizer = OPTIMIZERS[case.optimizer](net)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in net.parameters():
        p.requires_grad_(id(p) in trained)
    rules = {"adascale": anybatch.AdaScale, "square root": anybatch.SquareRoot, "identity": anybatch.Identity}
    # A base batch below 1 is trained as two halves, or there is no variance to see; a large one as whole base batches.
    samples = 2 if case.scale < 1 else int(case.scale)
    micro = max(1, int(task.base * case.scale / samples))
    base = micro * samples / case.scale
    controller = anybatch.attach(
        optimizer,
        model=net,
        rule=rules[case.rule](decays=case.decays),
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / task.total)),
        total=task.total,
        base_batch=base,
        micro_batch=micro,
    )
    order = torch.Generator().manual_seed(seed)
    while not controller.done:
        found = gradients(net, *task.batch(samples, micro, order))
        controller.observe([g for g, p in zip(found, net.parameters(), strict=True) if p.requires_grad])
        optimizer.step()
        optimizer.zero_grad()
    controller.detach()
    x, y = task.held_out()
    with torch.no_grad():
        return {"steps": controller.steps, "test_loss": cross_entropy(net(x), y).item()}


def mark(values: list[float], base: list[float]) -> str:
    """`-` for a significantly higher loss than scale 1's, `+` for a lower one."""
    if len(values) < 2 or values == base or ttest_ind(values, base, equal_var=False).pvalue >= 0.05:
        return ""
    return "-" if fmean(values) > fmean(base) else "+"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", default="digits,bytes")
    parser.add_argument("--total", type=int, help="base iterations, in place of the tasks'")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    base: list[float] = []
    print(f"{'task':7} {'optimizer':17} {'S':>6} {'rule':11} {'decays':9} {'steps':>6}  test loss")
    for case in cases(options.tasks.split(",")):
        if options.total:
            TASKS[case.task] = replace(TASKS[case.task], total=options.total)
        runs = [train(case, seed) for seed in range(options.seeds)]
        losses, steps = [run["test_loss"] for run in runs], fmean(run["steps"] for run in runs)
        base = losses if case.scale == 1 else base
        spread = stdev(losses) if len(losses) > 1 else 0.0
        found = mark(losses, base)
        print(
            f"{case.task:7} {case.optimizer:17} {case.scale:6g} {case.rule:11} {case.decays:9} {steps:6.0f}  "
            f"{fmean(losses):.4f} ± {spread:.4f} {found}",
            flush=True,
        )
        rows.append({**vars(case), "steps": steps, "losses": losses, "mark": found})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
