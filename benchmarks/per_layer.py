"""What a step whose layers are measured (`RunRecord(path, per_layer=k)`) costs beyond any other step, and one between.

    python -m benchmarks.per_layer [--turns 20]

Operations and entries read are counted, so they are the same on any machine; the times are the process's, in turns.
"""

import argparse
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
from torch import nn

import anybatch
from benchmarks.overhead import step_of
from benchmarks.overhead_counts import Ops
from benchmarks.overhead_loops import Step, ours
from benchmarks.overhead_models import MODELS


def seconds(step: Step) -> float:
    """Of one step, of the process."""
    start = time.process_time()
    step()
    return time.process_time() - start


def layers_of(net: nn.Module) -> int:
    """How many modules have parameters of their own."""
    return sum(any(True for _ in module.parameters(recurse=False)) for module in net.modules())


def row(name: str, turns: int, folder: Path) -> str:
    """A line of the table; the records go to `folder`."""
    model = MODELS[name]
    torch.manual_seed(0)
    net, x = model.make(), model.example()
    records = [anybatch.RunRecord(folder / f"{name}-{every}.jsonl", per_layer=every) for every in (None, 1, 10**9)]
    loops = [ours(record=record) for record in records]
    plain, always, never = (step_of(loop, deepcopy(net), x, "SGD") for loop in loops)
    for step in (plain, always, never):
        step()  # the first is looked at everywhere, and makes what stays
        step()
    counts = [Ops.of(step) for step in (plain, always, never)]
    look, between = (each.beyond(counts[0], unit=model.parameters()) for each in counts[1:])
    times = [[seconds(step) for step in (plain, always)] for _ in range(turns)]
    ratio = median(at_look / usual for usual, at_look in times)
    sizes = f"{len(list(net.parameters()))} | {layers_of(net)}"
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
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            print(row(name, turns, Path(folder)))


if __name__ == "__main__":
    main()
