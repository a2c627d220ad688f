"""Run a function in real gloo processes and collect what each returns."""

import gc
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function, *, world, args=()):
    """`function(rank, *args)` on `world` processes; the list of their returned values, which `torch.save` must take."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_entry, args=(function, world, folder, args), nprocs=world, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _entry(rank, function, world, folder, args):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
        gc.collect()  # cycles hold process groups, whose threads must not outlive their group
        dist.barrier()  # without it about a third of the processes abort at exit
    finally:
        dist.destroy_process_group()
