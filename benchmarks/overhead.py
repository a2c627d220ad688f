"""What a controller costs, beside others that measure the same: a step's time as a ratio to the plain loop's.

    python -m benchmarks.overhead                    one process, DDP and FSDP2 with two; what is installed is measured
    python -m benchmarks.overhead --install          the same in .venv-overhead, made here with fairscale and AdaptDL
    python -m benchmarks.overhead --models tiny --routes single --seconds 5 --json rows.json

One thread a process. A step is four backwards and one `optimizer.step()`. All loops of a row take turns step by step,
in random order, in one process, each with its own copy of the model; a sample is the ratio of one loop's step to the
plain loop's step of the same turn, and the table has their median with a bootstrap interval of 95 %. "plain again" is a
second plain loop: what it is off from 1 is noise. The ratios are of the process's own time, which other work on the
machine disturbs less, and beside them of the wall clock's, with the waiting of one rank for the other.

Beside them, what does not depend on the machine, of one step and beyond the plain loop's: dispatched operations,
entries read by them in units of the model's parameters, collectives, and the host's reads of a result.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from benchmarks.overhead_counts import Counts, Ops
from benchmarks.overhead_loops import LOOPS, RIVALS, Loop, MissingError, Step
from benchmarks.overhead_models import MODELS, OPTIMIZERS

ACCUMULATION = 4
LEAST, MOST = 10, 200  # turns
HERE = Path(__file__).resolve().parent.parent
VENV = HERE / ".venv-overhead"


def _sharded(model: nn.Module) -> nn.Module:
    blocks = list(getattr(model, "blocks", []))
    for block in blocks if len(blocks) <= 8 else []:  # a unit costs a collective, however small
        fully_shard(block)
    fully_shard(model)
    return model


ROUTES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "single": lambda model: model,
    "compiled": lambda model: cast("nn.Module", torch.compile(model)),
    "ddp": lambda model: DistributedDataParallel(model),  # noqa: PLW0108
    "fsdp2": _sharded,
}
ALONE = ("single", "compiled")  # on one process


@dataclass(frozen=True)
class Row:
    """One loop on one model.

    Args:
        plain_ms: median time of the plain loop's step, on the wall clock.
        ratio: median of the paired ratios of the process's time, with its interval from `low` to `high`.
        wall: of the wall clock's.
        counts: of one step, beyond the plain loop's; with one process alone.
    """

    route: str
    model: str
    optimizer: str
    loop: str
    plain_ms: float
    ratio: float
    low: float
    high: float
    wall: float
    turns: int
    counts: Counts | None


@dataclass(frozen=True)
class Sample:
    """Seconds of one step."""

    wall: float
    cpu: float


def synchronised(model: nn.Module, last: bool) -> Any:
    """Reduce the gradients in a window's last backward alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def step_of(make: Callable[..., Loop], model: nn.Module, x: Tensor, optimizer: str) -> Step:
    """A step of the loop that `make` makes."""
    loop = make(model, OPTIMIZERS[optimizer](model.parameters()), ACCUMULATION)

    def step() -> None:
        for i in range(ACCUMULATION):
            last = i == ACCUMULATION - 1
            loop.syncs(last)
            with synchronised(model, last):
                (model(x).square().mean() / ACCUMULATION).backward()
        loop.step()
        loop.zero_grad()

    return step


def measure(route: str, names: list[str], optimizers: list[str], seconds: float) -> Iterator[Row]:
    wrap = ROUTES[route]
    for name in names:
        for optimizer in optimizers:
            steps: dict[str, Step] = {}
            for loop in LOOPS:
                if route == "fsdp2" and loop in RIVALS:
                    continue  # their hooks are on the shards, where no gradient arrives
                torch.manual_seed(0)
                x = MODELS[name].example()
                try:
                    steps[loop] = step_of(LOOPS[loop], wrap(MODELS[name].make()), x, optimizer)
                except MissingError:
                    continue
            yield from _rows(route, name, optimizer, steps, seconds)


def _rows(route: str, name: str, optimizer: str, steps: dict[str, Step], seconds: float) -> Iterator[Row]:
    order = random.Random(0)
    for _ in range(3):  # slots, momentum buffers and averages are made once
        _turn(steps, order)
    start = time.perf_counter()
    _turn(steps, order)
    turns = torch.tensor(min(max(seconds / (time.perf_counter() - start), LEAST), MOST))
    if route not in ALONE:
        dist.broadcast(turns, 0)
    taken = [_turn(steps, order) for _ in range(int(turns))]
    plain_ms = 1e3 * median(turn["plain"].wall for turn in taken)
    counts = {loop: Ops.of(step) for loop, step in steps.items()} if route == "single" else {}  # a graph shows none
    for loop in steps:
        if loop == "plain":
            continue
        ratios = [turn[loop].cpu / turn["plain"].cpu for turn in taken]
        wall = median(turn[loop].wall / turn["plain"].wall for turn in taken)
        low, high = interval(ratios)
        beyond = counts[loop].beyond(counts["plain"], unit=MODELS[name].parameters()) if counts else None
        yield Row(route, name, optimizer, loop, plain_ms, median(ratios), low, high, wall, len(ratios), beyond)


def _turn(steps: dict[str, Step], order: random.Random) -> dict[str, Sample]:
    times = {}
    for name in order.sample(list(steps), len(steps)):
        if dist.is_initialized():
            dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        steps[name]()
        times[name] = Sample(time.perf_counter() - start, time.process_time() - cpu)
    return times


def interval(samples: list[float], draws: int = 2000) -> tuple[float, float]:
    """Where 95 % of the medians of resampled `samples` lie."""
    draw = torch.Generator().manual_seed(0)
    values = torch.tensor(samples, dtype=torch.float64)
    medians = values[torch.randint(len(samples), (draws, len(samples)), generator=draw)].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _rank(rank: int, route: str, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{route}", rank=rank, world_size=2)
    rows = []
    for row in measure(route, options.models, options.optimizers, options.seconds):
        rows.append(asdict(row))
        if rank == 0:
            show(row)
    if rank == 0:
        Path(folder, f"{route}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def show(row: Row) -> None:
    line = f"{row.route:6} {row.model:11} {row.optimizer:6} {row.loop:18} {row.plain_ms:8.1f} {row.ratio:6.3f} "
    line += f"[{row.low:.3f}, {row.high:.3f}] {row.wall:6.3f} {row.turns:4}"
    if row.counts is not None:
        line += f" {row.counts.operations:7} {row.counts.reads:6.2f} {row.counts.collectives:3} {row.counts.syncs:6}"
    print(line, flush=True)


def install() -> None:
    """Make `.venv-overhead` and go on in it. What cannot be installed is left out."""
    python = str(VENV / "bin" / "python")
    if Path(sys.prefix) == VENV:
        return
    if not VENV.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip = [python, "-m", "pip", "install", "-q", "-c", str(HERE / "constraints.txt")]
        subprocess.run([*pip, "torch"], check=True)  # first: an unpinned torch would bring gigabytes of CUDA
        subprocess.run([*pip, "-e", str(HERE)], check=True)
        for rival in (["fairscale"], ["--no-deps", "adaptdl"]):  # AdaptDL's own dependencies are its scheduler's
            subprocess.run([*pip, *rival], check=False)
    os.execv(python, [python, "-m", "benchmarks.overhead", *sys.argv[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12, help="about how long to measure a model on a route")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--json", help="write the rows here, too")
    parser.add_argument("--install", action="store_true", help="make .venv-overhead, and measure in it")
    options = parser.parse_args()
    if options.install:
        install()
    torch.set_num_threads(1)
    for rival, load in RIVALS.items():
        try:
            load()
        except MissingError as missing:
            print(f"{rival} is left out: {missing}")
    print(
        f"{'route':6} {'model':11} {'optim':6} {'loop':18} {'plain ms':>8} {'ratio':>6} {'95 %':^14}   wall turns",
        end=" ",
    )
    print(f"{'ops':>6} {'reads':>6} {'coll':>3} {'syncs':>5}")
    rows = []
    for route in options.routes:
        if route in ALONE:
            for row in measure(route, options.models, options.optimizers, options.seconds):
                show(row)
                rows.append(asdict(row))
        else:
            with tempfile.TemporaryDirectory() as folder:
                start_processes(_rank, args=(route, options, folder), nprocs=2, start_method="spawn")
                rows += json.loads(Path(folder, f"{route}.json").read_text())
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
