"""The processes that trainings run in, and what becomes of them when who started them is killed.

A job is a process of its own that sees the devices of its place alone, and trains there, or starts torchrun there. A
run is claimed while it is trained, so that several machines that see the same cache can be given the same command: each
takes what no other is at.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import ceil
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from recipes.paper.machine import Machine
from recipes.paper.runs import Run, Summary, cached, task_of
from recipes.train import run
from recipes.training.parallel import process_group
from recipes.training.task import DataError

Action = Callable[[Run, Path, Machine], None]
LONG = 10_000  # base iterations: a run of more of them is saved a hundred times, a shorter one four times


def train_all(runs: Iterable[Run], *, cache: Path, machine: Machine) -> Iterator[tuple[Run, Summary]]:
    """Summaries with the evaluations as `"history"`, in the order in which they are done, the cached ones first."""
    missing = []
    for one in dict.fromkeys(runs):
        summary = cached(one, cache)
        if summary is None:
            missing.append(one)
        else:
            yield one, summary
    if not missing:
        return
    missing.sort(key=lambda r: -max(float(s.split("@")[0]) for s in r.scale.split(",")))
    with pool(machine, most=len(missing)) as workers:
        for wait in (False, True):  # what another machine is at comes last, and is waited for
            futures = {workers.submit(_train, one, cache, machine, wait=wait): one for one in missing}
            for future in as_completed(futures):
                if (summary := future.result()) is not None:
                    missing.remove(futures[future])
                    yield futures[future], summary


@contextmanager
def pool(machine: Machine, *, most: int) -> Iterator[ProcessPoolExecutor]:
    """Processes with a place each, at most so many."""
    context = get_context("spawn")
    places = context.SimpleQueue()
    for place in machine.places():
        places.put(place)
    with ProcessPoolExecutor(
        min(machine.jobs, most), mp_context=context, initializer=_settle, initargs=(places,)
    ) as workers:
        try:
            yield workers
        except BrokenProcessPool:
            raise DataError(
                "A training's process was ended from outside, perhaps for want of memory: the same command goes on, "
                "if need be with fewer --jobs."
            ) from None
        except Exception as error:
            if most > 1:  # what one run is wrong in is said now, not after all others
                print(f"{error}\nWhat is in training is finished first, and nothing else begun.", file=sys.stderr)
            raise
        finally:
            workers.shutdown(cancel_futures=True)


def in_place(action: Action, one: Run, path: Path, machine: Machine) -> None:
    """`action(one, path, machine)` here, or in the processes that a training has, which end with this one."""
    if machine.processes == 1:
        action(one, path, machine)
        return
    name = f"{action.__module__}:{action.__qualname__}"
    told = {"action": name, "run": asdict(one), "path": str(path), "machine": asdict(machine)}
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(machine.processes)]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "-m", "recipes.paper.jobs", json.dumps(told)], stdin=subprocess.PIPE
    )
    if code := process.wait():
        raise DataError(f"{one.key}: its {machine.processes} processes ended with code {code}; see above.")


def train(one: Run, cache: Path, machine: Machine) -> None:
    """Train a run, going on from its checkpoint, which goes when the run is done."""
    gc.collect()  # the model of the run before, whose hooks are a circle, would stay on the device beside this one
    out, task = cache / one.key, task_of(one)
    save_every = task.total / 100 if task.total > LONG else max(task.total / 4, ceil(task.total / 100))
    options = one.options(out=out, save_every=save_every, workers=machine.workers, compile=machine.compile)
    run(task, replace(options, total=task.total))
    if os.environ.get("RANK", "0") == "0":
        for path in out.glob("checkpoint*"):
            path.unlink()


def _train(one: Run, cache: Path, machine: Machine, *, wait: bool) -> Summary | None:
    out = cache / one.key
    out.mkdir(parents=True, exist_ok=True)
    with _claimed(out / "claim", wait=wait) as mine:
        if not mine:
            return None
        if cached(one, cache) is None:  # another machine may have trained it since
            (out / "run.json").write_text(json.dumps(asdict(one), indent=1) + "\n")
            in_place(train, one, cache, machine)
        summary = cached(one, cache)
    if summary is None:
        raise RuntimeError(f"{out} holds no summary after its training.")
    return summary


@contextmanager
def _claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process alone has what is at `path`. The claim ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: there one machine has a cache for itself
        yield True
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _settle(places: Any) -> None:
    """In a new process: it sees the devices of one place, and ends when who started it does."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": places.get(), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    starter = parent_process()
    if starter is not None:
        _end_after(starter.join)


def _end_after(wait: Callable[[], Any]) -> None:
    def watch() -> None:
        wait()
        os._exit(1)  # its claims go with it, so nothing may go on

    threading.Thread(target=watch, daemon=True).start()


def main(told: str) -> None:
    """One of torchrun's processes; its standard input ends when who started it does."""
    _end_after(lambda: os.read(0, 1))
    given = json.loads(told)
    module, name = given["action"].split(":")
    action: Action = getattr(importlib.import_module(module), name)
    with process_group():
        action(Run(**given["run"]), Path(given["path"]), Machine(**given["machine"]))


if __name__ == "__main__":
    main(sys.argv[1])
