"""Processes that have imported torch already: forks of one server that Python keeps, a few milliseconds each.

`preloaded.py` is what the server imports. A process has the environment and the path of the test that starts it.
"""

import contextlib
import datetime
import gc
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import time
import traceback
import warnings
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

SECONDS = 120  # no process is waited for longer
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preloaded"])


class Processes:
    """The processes of one test, each in a session of its own so that its children can be found again."""

    def __init__(self, folder):
        self._folder = folder
        self._started = []

    def start(self, function, *args, **options):
        """`function(*args, **options)` in a new process."""
        child = Child(self._folder / f"process-{len(self._started)}", function, args, options)
        self._started.append(child)
        return child

    def world(self, function, ranks, *args, timeout=60, **options):
        """`function(rank, *args, **options)` in a gloo group of `ranks` new processes."""
        rendezvous = self._folder / f"rendezvous-{len(self._started)}"
        return [
            self.start(_member, function, rendezvous, rank, ranks, timeout, *args, **options) for rank in range(ranks)
        ]

    def results(self, function, ranks, *args, **options):
        """What each process of a world returns."""
        return [child.result() for child in self.world(function, ranks, *args, **options)]

    def close(self):
        for child in self._started:
            child.end()


class Child:
    """A process with its output in a file, and what it returned or raised in another."""

    def __init__(self, path, function, args, options):
        self._result = path.with_suffix(".pickle")
        self.output = path.with_suffix(".txt")
        self._process = _CONTEXT.Process(target=_entry, args=(path, {**os.environ}, function, args, options))
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
            forkserver.ensure_running()  # Python 3.11 gives the server no other path
        self._process.start()
        self.pid = self._process.pid

    @property
    def exitcode(self):
        """Minus the signal that ended it; `None` while it runs."""
        return self._process.exitcode

    def join(self, seconds=SECONDS):
        self._process.join(seconds)
        assert self.exitcode is not None, f"still running after {seconds} s:\n{self.text()[-3000:]}"
        return self.exitcode

    def signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """SIGKILL; whether that is what it ended by."""
        self._process.kill()
        return self.join() == -signal.SIGKILL

    def outcome(self, seconds=SECONDS):
        """`("returned", value)`, or `("raised", names of its classes, message)`."""
        code = self.join(seconds)
        assert self._result.exists(), f"exit status {code} and no result:\n{self.text()[-3000:]}"
        return pickle.loads(self._result.read_bytes())

    def result(self, seconds=SECONDS):
        outcome = self.outcome(seconds)
        assert outcome[0] == "returned", f"{outcome[1][0]}: {outcome[2]}\n{self.text()[-3000:]}"
        return outcome[1]

    def text(self):
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def end(self):
        """Kill it and what it has started."""
        if self.exitcode != 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.join(SECONDS)
        self._process.close()


def until(condition, what, seconds=SECONDS):
    """Wait for a state that can be seen from outside."""
    deadline = time.monotonic() + seconds
    while not (seen := condition()):
        assert time.monotonic() < deadline, f"{what}: not seen in {seconds} s"
        time.sleep(0.005)
    return seen


def state_of(pid):
    """The letter and the exit status that Linux shows of a process; `("", None)` once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", None
    return fields[0], int(fields[-1])


def script(path, arguments):
    """What `python path *arguments` does; a worker of torchrun, too, ends by itself once its agent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # by which `multiprocessing` would end it
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name="__main__")


def torchrun(*options):
    """What `torchrun *options` does; but its workers are forks of this process."""
    config, _, (_, path, *arguments) = config_from_args(parse_args([*map(str, options)]))
    config.start_method = "fork"
    elastic_launch(config, script)(path, arguments)


def _entry(path, environment, function, args, options):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with path.with_suffix(".txt").open("wb", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch 2.13: a restart finds addresses of the dead
    warnings.simplefilter("ignore")
    try:
        import preloaded  # noqa: F401  # by the server, which keeps silent about an error in it

        outcome = ("returned", function(*args, **options))
    except Exception as error:
        traceback.print_exc()
        outcome = ("raised", [each.__name__ for each in type(error).__mro__], str(error))
    new = path.with_suffix(".new")
    new.write_bytes(pickle.dumps(outcome))
    new.replace(path.with_suffix(".pickle"))
    if outcome[0] == "raised":
        os._exit(1)  # nothing that waits for a peer


def _member(function, rendezvous, rank, ranks, timeout, *args, **options):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    value = function(rank, *args, **options)
    gc.collect()  # cycles hold process groups, whose threads must not outlive their group
    dist.barrier()  # without it about a third of the processes abort at exit
    dist.destroy_process_group()
    return value
