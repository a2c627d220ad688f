"""What an experiment will take, before it starts: runs, device-hours and gigabytes, from measured steps.

    seconds of a run = steps * step + micro-batches * micro-batch + evaluations * evaluation

Linear rules take T/S steps. AdaScale's lie between T/S, where all is noise, and T, where there is none; so do those of
LSW+, as long as AdaScale's are not known.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from recipes.paper.jobs import in_place, pool
from recipes.paper.machine import Machine
from recipes.paper.runs import Run, cached, task_of
from recipes.train import Training
from recipes.training.parallel import Place, here
from recipes.training.task import Task

LINE = 310  # bytes of a step in a record (docs/findings.md)
SECONDS = 2.0  # that steps are measured for; a slow one, three times
ENDLESS = 10**9  # base iterations: no measured run comes to its end
UNMEASURED = 2  # steps before: they compile, choose kernels and begin to load


@dataclass(frozen=True)
class Cost:
    """Measured: seconds of a step without its micro-batches, of one of these, and of an evaluation; and bytes."""

    step: float
    micro_batch: float
    evaluation: float
    memory: int  # the most on a device, or in a process that trains on the CPU
    checkpoint: int


@dataclass(frozen=True)
class Work:
    """Optimizer steps, and micro-batches of a rank."""

    steps: float
    micro_batches: float

    def seconds(self, cost: Cost) -> float:
        """Without evaluations."""
        return self.steps * cost.step + self.micro_batches * cost.micro_batch


def work(one: Run, task: Task, *, processes: int) -> tuple[Work, Work]:
    """The least and the most that a run takes."""
    options, total = _unruled(one).options(), one.total or task.total
    ends = [share for _, share in options.scales[1:]] + [1.0]

    def at(gain: Callable[[float], float]) -> Work:
        steps = micro_batches = 0.0
        for (scale, since), until in zip(options.scales, ends, strict=True):
            few = (until - since) * total / gain(scale)
            steps += few
            micro_batches += few * options.accumulation_for(scale, task, ranks=processes)
        return Work(steps, micro_batches)

    if one.rule == "identity":
        return (at(lambda _: 1.0),) * 2
    linear = at(lambda scale: scale)
    if one.rule in ("linear", "lsw", "sqrt"):
        return linear, linear
    if one.rule == "lsw+" and one.steps:
        return (Work(one.steps, one.steps * linear.micro_batches / linear.steps),) * 2
    return at(lambda scale: max(1.0, scale)), at(lambda scale: min(1.0, scale))


def measure(one: Run, path: Path, machine: Machine) -> None:
    """Write the `Cost` of a run to the file `path`, from steps of one micro-batch and of three."""
    place = here()
    first, _, _ = _measured(one, 1, machine, place)
    gc.collect()  # one training at a time is in memory
    third, evaluation, checkpoint = _measured(one, 3, machine, place)
    each = max((third - first) / 2, 0.0)
    cost = Cost(max(0.0, first - each), each, evaluation, _memory(place), checkpoint)
    if place.first:
        path.write_text(json.dumps(asdict(cost)))


def _measured(one: Run, accumulation: int, machine: Machine, place: Place) -> tuple[float, float, int]:
    """Seconds of a step and of an evaluation, and the bytes of weights and optimizer."""
    task, unscaled = task_of(one), replace(_unruled(one), total=ENDLESS)
    size = unscaled.options().micro_batch_for(task, ranks=place.ranks)
    scale = accumulation * place.ranks * size / task.base_batch
    options = replace(unscaled, scale=repr(scale), micro_batch=size).options(
        workers=machine.workers, compile=machine.compile
    )
    training = Training(task, options, place)
    step, evaluation = _steps(training, place), _timed(training.evaluate, place)
    states = [training.net.state_dict(), *(optimizer.state for optimizer in training.optimizers)]
    training.close()
    return step, evaluation, sum(map(_bytes, states))


def costs(one: Run, machine: Machine) -> Cost:
    """The cost of a run's steps, measured where it would be trained, by one training at a time."""
    with TemporaryDirectory() as folder, pool(machine, most=1) as workers:
        path = Path(folder) / "cost.json"
        workers.submit(in_place, measure, one, path, machine).result()
        return Cost(**json.loads(path.read_text()))


def told(wanted: Sequence[Run], *, cache: Path | None, machine: Machine, task: Task, more: int = 0) -> str:
    """What is to be trained, and what that takes, with so many micro-batches more; empty where nothing is missing."""
    runs = list(dict.fromkeys(wanted))
    missing = [one for one in runs if cache is None or cached(one, cache) is None]
    if not missing:
        return ""
    bounds = list(zip(*(work(one, task, processes=machine.processes) for one in missing), strict=True))
    # Several processes cut the base batch of scale 1 into smaller micro-batches than a large batch has.
    sizes = [one.options().micro_batch_for(task, ranks=machine.processes) for one in map(_unruled, missing)]
    found = {size: costs(missing[sizes.index(size)], machine) for size in dict.fromkeys(sizes)}
    cost = [found[size] for size in sizes]
    jobs, device = min(machine.jobs, len(missing)), "device" if machine.devices else "core"
    rest = sum(run.evaluations * its.evaluation for run, its in zip(missing, cost, strict=True))
    rest += more * cost[0].micro_batch
    seconds = [sum(one.seconds(its) for one, its in zip(some, cost, strict=True)) + rest for some in bounds]
    hours = [some * machine.processes / 3600 for some in seconds]
    steps = [sum(one.steps for one in some) for some in bounds]
    clock = [hour / (jobs * machine.processes) for hour in hours]
    disk = steps[1] * LINE + 2 * jobs * max(its.checkpoint for its in cost)
    return "\n".join([
        f"{len(missing)} of {len(runs)} runs are to be trained, {jobs} at a time, each on {machine.processes} "
        f"{device}{'s' if machine.processes > 1 else ''}.",
        *(f"A step takes {its.step:.3g} s and {its.micro_batch:.3g} s for each micro-batch of {size}, an evaluation "
          f"{its.evaluation:.3g} s: measured by one training alone." for size, its in found.items()),
        f"Steps: {_range(steps, ',.0f')}. AdaScale's are between T/S and T.",
        f"Time: {_range(hours, '.3g')} {device}-hours, {_range(clock, '.3g')} hours by the clock.",
        f"Memory: {max(its.memory for its in cost) / 1e9:.2g} GB a {device}. Disk: up to {disk / 1e9:.2g} GB.",
    ])  # fmt: skip


def _unruled(one: Run) -> Run:
    """Of the same batches, whatever the rule: LSW+ has no options before its steps are known."""
    return replace(one, rule="adascale", steps=None)


def _steps(training: Training, place: Place) -> float:
    for _ in range(UNMEASURED):
        training.step()
    number, seconds = 0, 0.0
    while number < 3 or float(place.summed(torch.tensor(seconds, device=place.device))) < SECONDS * place.ranks:
        seconds += _timed(training.step, place)
        number += 1
    return seconds / number


def _timed(function: Callable[[], object], place: Place) -> float:
    _finish(place)
    start = time.perf_counter()
    function()
    _finish(place)
    return time.perf_counter() - start


def _finish(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def _memory(place: Place) -> int:
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated(place.device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value.values())) if isinstance(value, dict) else 0


def _range(bounds: Sequence[float], form: str) -> str:
    least, most = (format(bound, form) for bound in bounds)
    return least if least == most else f"{least} to {most}"
