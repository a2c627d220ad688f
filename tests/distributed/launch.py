"""Run a function in real gloo processes and collect what each returns."""

import faulthandler
import gc
import os
import signal
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import Processes
from torch.multiprocessing.spawn import ProcessException

SECONDS = 900  # a launch that takes longer hangs, also on a machine that others use


def run(function, *, world, args=(), seconds=SECONDS):
    """`function(rank, *args)` on `world` processes; the list of their returned values, which `torch.save` must take.

    One fork of the server in `processes.py` imports the function's module, and forks the ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(Path(folder))
        try:
            processes.start(start, "fork", function, world, folder, args, seconds).result(seconds)
        finally:
            processes.close()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def start(method, function, world, folder, args, seconds=SECONDS):
    """The ranks, by fork or spawn; the first error of one ends all, and is raised here with its traceback."""
    given, test = (function, world, folder, args, seconds), mp.parent_process()
    ranks = mp.start_processes(_entry, args=given, nprocs=world, start_method=method, join=False)
    try:
        while not ranks.join(1):
            if test is not None and not test.is_alive():
                os.killpg(0, signal.SIGKILL)  # this process and its ranks, a session of their own
    except ProcessException as error:  # of any rank, perhaps of one that only lost its peer
        errors, codes = Path(folder) / "errors", [each.exitcode for each in ranks.processes]
        raise RuntimeError(f"{errors.read_text() if errors.exists() else ''}{error}\nExit codes: {codes}") from None


def _entry(rank, function, world, folder, args, seconds):
    faulthandler.dump_traceback_later(seconds * 0.9)  # where a rank hangs
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
        gc.collect()  # cycles hold process groups, whose threads must not outlive their group
        dist.barrier()  # without it about a third of the processes abort at exit
    except BaseException:
        with (Path(folder) / "errors").open("a") as errors:  # the first is the cause: the others lose their peer
            errors.write(f"Rank {rank}: {traceback.format_exc()}\n")
        raise
    finally:
        dist.destroy_process_group()
