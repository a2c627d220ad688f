"""What the benchmarks on the digits share: one training of the demo's network, and a table."""

import argparse
import json
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import anybatch
from anybatch._demo import LAST_RATE, digits, gradients, network

Losses = tuple[float, float, float]
Row = tuple[str, int, Callable[[int], Losses]]


def train(make: Callable[..., torch.optim.Optimizer], rule: anybatch.Rule, **run: Any) -> Losses:
    """Steps, training loss and test loss of one run, with the arguments of `trained`."""
    net, steps = trained(make, rule, **run)
    x, y, x_test, y_test = digits()
    with torch.no_grad():
        return steps, cross_entropy(net(x), y).item(), cross_entropy(net(x_test), y_test).item()


def trained(
    make: Callable[..., torch.optim.Optimizer],
    rule: anybatch.Rule,
    *,
    base: int,
    total: int,
    scale: int,
    seed: int,
    record: Callable[[dict[str, float]], object] | None = None,
) -> tuple[nn.Module, int]:
    """The network after one run, and its steps; the learning rate decays exponentially to 1 %."""
    x, y, _, _ = digits()
    net = network(seed)
    optimizer = make(net.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / total))
    controller = anybatch.attach(
        optimizer, model=net, rule=rule, scheduler=schedule, total=total, scale="count", record=record
    )
    order = torch.Generator().manual_seed(seed)
    while not controller.done:
        rows = torch.randint(len(x), (scale, base), generator=order)
        controller.observe(gradients(net, x[rows], y[rows]))
        optimizer.step()
        optimizer.zero_grad()
    return net, controller.steps


def table(description: str | None, rows: Callable[[], Iterable[Row]]) -> None:
    """Print means over seeds: `rows()` yields a label, a scale and a function of the seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", help="write the rows here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':42} {'S':>4} {'steps':>6} {'train loss':>11} {'test loss':>10}")
    found = []
    for label, scale, run in rows():
        steps, loss, test = (fmean(column) for column in zip(*map(run, range(options.seeds)), strict=True))
        print(f"{label:42} {scale:4} {steps:6.0f} {loss:11.4f} {test:10.4f}", flush=True)
        found.append({"label": label, "scale": scale, "steps": steps, "train_loss": loss, "test_loss": test})
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
