"""What a controller costs: time of a training step with and without it, as a ratio of interleaved medians.

    python -m benchmarks.overhead [--rounds 60] [--json overhead.json]

One thread a process. A step is `accumulation` backwards and one `optimizer.step()` of SGD with momentum; with two
ranks, under DistributedDataParallel on gloo. The two loops take turns step by step, so that both see the same machine.
"host" is the difference of the medians: what does not grow with the model is host time.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

import anybatch


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "mlp 26k, batch 8": (lambda: mlp(64, 128, 128, 10), 8, 64),
    "mlp 8.8M, batch 32": (lambda: mlp(1024, 2048, 2048, 1024, 256), 32, 1024),
    "mlp 8.8M, batch 128": (lambda: mlp(1024, 2048, 2048, 1024, 256), 128, 1024),
    "60 layers of 64, batch 32": (lambda: mlp(*[64] * 61), 32, 64),
}
KINDS: dict[str, dict[str, Any]] = {
    "AdaScale": {"rule": anybatch.AdaScale()},
    "AdaScale, lagged": {"rule": anybatch.AdaScale(), "lagged": True},
    "Linear, counting": {"rule": anybatch.Linear()},
}


def loop(model: nn.Module, x: torch.Tensor, accumulation: int, options: dict[str, Any] | None) -> Callable[[], float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    if options is not None:
        anybatch.attach(optimizer, model=model, base_batch=len(x), micro_batch=len(x), **options)

    def step() -> float:
        start = time.perf_counter()
        for i in range(accumulation):
            last = i == accumulation - 1
            with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
                (model(x).square().mean() / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def measure(rounds: int, ranks: int) -> list[dict[str, Any]]:
    rows = []
    for name, (make, batch, width) in MODELS.items():
        for accumulation in (1, 4):
            if ranks == 1 and accumulation == 1:
                continue  # one gradient a step shows no variance
            x = torch.randn(batch, width)
            steps = {}
            for label, kind in {"bare": None, **KINDS}.items():
                torch.manual_seed(0)
                model = make()
                if ranks > 1:
                    model = DistributedDataParallel(model)
                steps[label] = loop(model, x, accumulation, kind)
            times: dict[str, list[float]] = {label: [] for label in steps}
            for _ in range(rounds):
                for label, step in steps.items():
                    times[label].append(step())
            bare = median(times["bare"][rounds // 5 :])
            for label in KINDS:
                mine = median(times[label][rounds // 5 :])
                rows.append({
                    "model": name, "ranks": ranks, "accumulation": accumulation, "kind": label,
                    "bare_ms": 1e3 * bare, "ratio": mine / bare, "host_us": 1e6 * (mine - bare),
                })  # fmt: skip
    return rows


def _rank(rank: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows = measure(rounds, 2)
    if rank == 0:
        with open(os.path.join(folder, "rows.json"), "w") as file:
            json.dump(rows, file)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", help="write the rows here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.rounds, 1)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, args=(options.rounds, folder), nprocs=2, start_method="spawn")
        with open(os.path.join(folder, "rows.json")) as file:
            rows += json.load(file)
    print(f"{'model':28} {'ranks':>5} {'A':>2} {'kind':18} {'bare ms':>9} {'ratio':>6} {'host us':>8}")
    for r in rows:
        print(
            f"{r['model']:28} {r['ranks']:5} {r['accumulation']:2} {r['kind']:18} {r['bare_ms']:9.3f} "
            f"{r['ratio']:6.3f} {r['host_us']:8.0f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
