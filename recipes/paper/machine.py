"""Which devices a training runs on: each job has a place, one device or as many as a training has processes."""

import os
from dataclasses import dataclass

import torch

import anybatch
from recipes.training.loading import workers_for


@dataclass(frozen=True)
class Machine:
    """Where trainings run, which does not decide what comes out.

    Args:
        devices: as CUDA_VISIBLE_DEVICES names them; none: the CPU.
        jobs: trainings at a time.
        processes: of a training, each with a device of its own.
        workers: of each process, to load data.
        compile: whether the model is compiled.
    """

    devices: tuple[str, ...] = ()
    jobs: int = 1
    processes: int = 1
    workers: int = 0
    compile: bool = False

    def places(self) -> list[str]:
        """The devices of each job, in turn; where there are more jobs than places they share devices."""
        n, size = len(self.devices), self.processes
        return [
            ",".join(self.devices[(job * size + i) % n] for i in range(size) if n) for job in range(self.jobs)
        ]  # fmt: skip


def machine_here(*, jobs: int | None, processes: int, workers: int | None, compiled: bool) -> Machine:
    """This machine with a job for every place; without devices, one for every core.

    Raises:
        anybatch.InvalidValueError: more processes than devices, or a number that is not positive.
    """
    if processes < 1 or (jobs is not None and jobs < 1):
        raise anybatch.InvalidValueError(f"--jobs and --processes must be positive, got {jobs} and {processes}.")
    devices = devices_in(os.environ.get("CUDA_VISIBLE_DEVICES"), count=torch.cuda.device_count())
    if devices and processes > len(devices):
        raise anybatch.InvalidValueError(
            f"--processes {processes} is more than the {len(devices)} device(s) here, each of which takes one."
        )
    places = (len(devices) or os.cpu_count() or 1) // processes
    jobs = jobs or max(1, places)
    if workers is None:
        workers = workers_for(jobs * processes, device=bool(devices))
    return Machine(devices, jobs, processes, workers, compiled)


def devices_in(named: str | None, *, count: int) -> tuple[str, ...]:
    """The names of the `count` devices that are visible, by CUDA_VISIBLE_DEVICES or by their numbers."""
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    return tuple(names)[:count]
