"""What a record costs: microseconds a step, with and without, from interleaved medians.

    python -m benchmarks.record [--rounds 3000] [--steps 20000] [--json record.json]

One thread. A step is two backwards of a small model and one `optimizer.step()`, with AdaScale; the step is timed. The
loops take turns in a new order each round, so that all see the same machine. Then a record of `--steps` steps, the
recorded ones over and over, is read, forecast and drawn, each in a process of its own: its CPU seconds, and how far its
memory goes beyond that of the imports.
"""

import argparse
import importlib
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

import anybatch
from anybatch import sinks
from anybatch._report import report

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


def lengthened(path: Path, steps: int) -> Path:
    """A record of many steps beside the one at `path`."""
    run = anybatch.read_record(path)
    last = run.steps[-1].tau
    record = anybatch.RunRecord(
        path.with_name("long.jsonl"), config={**run.config, "total": last * steps / len(run.steps)}
    )
    for i in range(steps):
        rounds, place = divmod(i, len(run.steps))
        step = run.steps[place]
        record.write(replace(step, step=i + 1, tau=rounds * last + step.tau))
    record.close()
    return record.path


def read(path: Path) -> int:
    return len(anybatch.read_record(path).steps)


def line_by_line(path: Path) -> int:
    return sum(1 for _ in anybatch.iter_record(path))


def forecast(path: Path) -> int:
    return len(anybatch.forecast(path, [1, 2, 4, 8, 16, 32, 64]).scales)


def page(path: Path) -> int:
    return len(report([path]))


READERS = {"read_record": read, "iter_record": line_by_line, "forecast": forecast, "report": page}


def reading(name: str, path: Path) -> dict[str, float]:
    """CPU seconds and MB of one reader, in this process."""
    torch.set_num_threads(1)
    importlib.import_module("matplotlib.figure")
    before, start = _peak(), time.process_time()
    READERS[name](path)
    return {"seconds": time.process_time() - start, "MB": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=20_000, help="of the record that is read")
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
        long = lengthened(Path(folder) / "run.jsonl", options.steps)
        size = long.stat().st_size
        readings = {}
        for name in READERS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                readings[name] = pool.submit(reading, name, long).result()
    rows = [{"record": name, "step_us": m, "cost_us": m - medians["none"]} for name, m in medians.items()]
    for row in rows:
        print(f"{row['record']:27} step {row['step_us']:7.1f} us, of which the record {row['cost_us']:6.1f} us")
    print(f"a record of {options.steps} steps, {size / options.steps:.0f} bytes a step:")
    for name, found in readings.items():
        print(f"{name:27} {found['seconds']:7.2f} s, {found['MB']:6.0f} MB")
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows, "steps": options.steps, "reading": readings}, indent=1))


if __name__ == "__main__":
    main()
