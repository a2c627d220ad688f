"""What the processes of test_launch.py do."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import anybatch
from distributed import workers


def pids(folder):
    """The process of each rank and of the one that forked them, for the test to find; and where each was left."""
    for pid in (os.getpid(), os.getppid()):
        (Path(folder) / f"{pid}").touch()
    dist.barrier()


def environment(rank, name):
    """What this process and its test share, and what it has that no other has."""
    loaded = "preloaded" in sys.modules
    shared = os.environ.get(name), os.getcwd(), anybatch.__file__, torch.get_num_threads(), loaded
    return shared, os.getpid(), dist.get_world_size()


def training(rank):
    return workers.train(rank, accumulation=2)


def fails(rank, folder):
    pids(folder)
    if rank == 1:
        raise ZeroDivisionError("of rank 1")
    dist.barrier()


def dies(rank, folder):
    pids(folder)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hangs(rank, folder):
    pids(folder)
    if rank == 1:
        time.sleep(1000)
    dist.barrier()
