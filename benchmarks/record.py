"""What a record costs: microseconds a step, with and without, from interleaved medians.

    python -m benchmarks.record [--rounds 3000] [--json record.json]

One thread. A step is two backwards of a small model and one `optimizer.step()`, with AdaScale; the step is timed. The
loops take turns in a new order each round, so that all see the same machine. Then the reading of what was written.
"""

import argparse
import json
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import anybatch
from anybatch import sinks

Destination = Path | Callable[[dict[str, Any]], None] | None


def loop(record: Destination) -> Callable[[], float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    anybatch.attach(optimizer, model=model, scale="count", total=1e6, record=record)
    x = torch.randn(16, 32)

    def step() -> float:
        for _ in range(2):
            (model(x).square().mean() / 2).backward()
        start = time.perf_counter()
        optimizer.step()
        seconds = time.perf_counter() - start
        optimizer.zero_grad()
        return seconds

    return step


def destinations(folder: Path) -> dict[str, Destination]:
    made: dict[str, Destination] = {"none": None, "a file": folder / "run.jsonl", "a function": lambda _: None}
    try:
        from torch.utils.tensorboard import SummaryWriter

        made["tensorboard"] = sinks.tensorboard(SummaryWriter(folder / "short"))
        made["tensorboard, max_queue=1000"] = sinks.tensorboard(SummaryWriter(folder / "long", max_queue=1000))
    except ImportError:
        print("TensorBoard is not installed and not measured.")
    return made


def reading(path: Path) -> dict[str, float]:
    """A record of many steps, read whole and line by line."""
    steps = anybatch.read_record(path).steps
    record = anybatch.RunRecord(path.with_name("long.jsonl"))
    for i in range(20_000):
        record.write(anybatch.StepRecord(**{**vars(steps[i % len(steps)]), "step": i + 1}))
    record.close()
    start = time.perf_counter()
    count = sum(1 for _ in anybatch.iter_record(record.path))
    seconds = time.perf_counter() - start
    tracemalloc.start()
    for _ in anybatch.iter_record(record.path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"steps": count, "us a step": 1e6 * seconds / count, "bytes a step": record.path.stat().st_size / count,
            "peak KiB": peak / 1024}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--json", help="write the rows here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loops = {name: loop(record) for name, record in destinations(Path(folder)).items()}
        times: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(options.rounds):
            for name in random.sample(list(loops), len(loops)):
                times[name].append(loops[name]())
        medians = {name: 1e6 * median(t[options.rounds // 5 :]) for name, t in times.items()}
        read = reading(Path(folder) / "run.jsonl")
    rows = [{"record": name, "step_us": m, "cost_us": m - medians["none"]} for name, m in medians.items()]
    for row in rows:
        print(f"{row['record']:27} step {row['step_us']:7.1f} us, of which the record {row['cost_us']:6.1f} us")
    print("reading line by line: " + ", ".join(f"{value:.4g} {name}" for name, value in read.items()))
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows, "reading": read}, indent=1))


if __name__ == "__main__":
    main()
