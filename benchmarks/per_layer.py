"""What a step whose layers are looked at (`attach(per_layer=k)`) costs beyond any other step, and one between looks.

    python -m benchmarks.per_layer [--turns 20]

Operations and entries read are counted, so they are the same on any machine; the times are the process's, in turns.
"""

import argparse
import time
from statistics import median

import torch
from torch import nn

import anybatch
from benchmarks.overhead_counts import Counts, Ops
from benchmarks.overhead_models import MODELS, OPTIMIZERS, Model

ACCUMULATION = 4


class Run:
    """A model that is trained, at `step()` by one step; `every` is `per_layer`."""

    def __init__(self, model: Model, every: int | None) -> None:
        torch.manual_seed(0)
        self.net, self.x = model.make(), model.example()
        self.optimizer = OPTIMIZERS["SGD"](self.net.parameters())
        anybatch.attach(
            self.optimizer, model=self.net, scale="count", total=1e6, record=lambda _: None, per_layer=every
        )

    def step(self) -> None:
        """One of `ACCUMULATION` micro-batches."""
        for _ in range(ACCUMULATION):
            (self.net(self.x).square().mean() / ACCUMULATION).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """Of one step, of the process."""
        start = time.process_time()
        self.step()
        return time.process_time() - start


def layers_of(net: nn.Module) -> int:
    """How many modules have parameters of their own."""
    return sum(any(True for _ in module.parameters(recurse=False)) for module in net.modules())


def row(name: str, turns: int) -> str:
    """A line of the table."""
    model = MODELS[name]
    plain, always, never = (Run(model, every) for every in (None, 1, 10**9))
    for run in (plain, always, never):
        run.step()  # the first is looked at everywhere, and makes what stays
        run.step()
    counts: list[Counts] = [Ops.of(run.step) for run in (plain, always, never)]
    look, between = (each.beyond(counts[0], unit=model.parameters()) for each in counts[1:])
    times = [[run.seconds() for run in (plain, always)] for _ in range(turns)]
    ratio = median(at_look / usual for usual, at_look in times)
    sizes = f"{len(list(plain.net.parameters()))} | {layers_of(plain.net)}"
    counted = f"{counts[0].operations} | {look.operations} | {look.reads:.2f} | {between.operations}"
    return f"| {name} | {sizes} | {counted} | {ratio:.2f} | {(ratio - 1) / 100:.2%} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What looking at layers costs.")
    parser.add_argument("--turns", type=int, default=20, help="steps of each kind that are timed")
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    columns = ["tensors", "layers", "operations", "more at a look", "reads", "more between", "time of a look"]
    print(" | ".join(["| model", *columns, "per_layer=100 |"]))
    print("|---|" + "--:|" * (len(columns) + 1))
    for name in MODELS:
        print(row(name, turns))


if __name__ == "__main__":
    main()
