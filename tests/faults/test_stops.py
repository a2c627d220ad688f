"""A rank that stands still: the others do not wait for it longer than the process group's timeout."""

import signal
import time

import pytest
from processes import state_of, until

from faults import jobs
from faults.ledger import json_lines

TIMEOUT = 2  # seconds of the process group
SLACK = 20  # for a machine with other work; without a timeout it would be forever


@pytest.mark.parametrize("stopped", [0, 1])
def test_the_others_of_a_stopped_rank_raise_within_the_timeout(faults, processes, times, rng, tmp_path, stopped):
    for i in range(times(1, 5)):
        folder = tmp_path / str(i)
        folder.mkdir()
        world = processes.world(jobs.train, 2, folder, timeout=TIMEOUT, total=1e6, pause=0.001)
        until(lambda: [line for line in json_lines(folder / "log.jsonl") if line["event"] == "saved"], "a save")
        time.sleep(rng.uniform(0, 0.1))
        world[stopped].signal(signal.SIGSTOP)
        until(lambda: state_of(world[stopped].pid)[0] == "T", "a stopped process")
        faults.fired()
        began = time.monotonic()
        kind, classes, message = world[1 - stopped].outcome(TIMEOUT + SLACK)
        waited = time.monotonic() - began
        assert (kind, "RuntimeError" in classes) == ("raised", True)
        assert "imed out" in message, message
        assert f"{1000 * TIMEOUT}ms" in message, message
        assert waited > TIMEOUT / 2, "it waited for the rank first"
        world[stopped].signal(signal.SIGCONT)  # it finds that it is alone
        kind, classes, message = world[stopped].outcome(TIMEOUT + SLACK)
        assert (kind, "RuntimeError" in classes) == ("raised", True)
        faults.survived()
