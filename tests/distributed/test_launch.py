"""The launcher: what its ranks share with the test, and that an error of one ends all of them and reaches the test."""

import os
import tempfile
import time
from pathlib import Path

import pytest
import torch
from processes import state_of

from distributed import launch, workers
from distributed import launch_workers as mine


def test_ranks_are_processes_of_their_own_with_the_tests_surroundings(monkeypatch, tmp_path):
    for value in ("one", "two"):  # the server has been started before the second
        monkeypatch.setenv("ANYBATCH_LAUNCH", value)
        monkeypatch.chdir(tmp_path)
        found = launch.run(mine.environment, world=3, args=("ANYBATCH_LAUNCH",))
        assert {each[:4] for each in found} == {(value, str(tmp_path), 1, True)}
        assert len({each[4] for each in found} | {os.getpid()}) == 4
        assert {each[5] for each in found} == {3}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (mine.fails, r"(?s)Process 1 terminated.*, in fails\n.*ZeroDivisionError: of rank 1"),
        (mine.dies, "process 1 terminated with signal SIGKILL"),
        (mine.hangs, r"(?s)still running after 5 s.*launch_workers\.py., line \d+ in hangs"),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
def test_a_rank_that_fails_dies_or_hangs_fails_the_test_and_leaves_no_process(function, said, tmp_path):
    with pytest.raises(AssertionError, match=said):
        launch.run(function, world=2, args=(str(tmp_path),), seconds=5 if function is mine.hangs else launch.SECONDS)
    pids = {int(path.name) for path in tmp_path.iterdir()}
    assert len(pids) == 3
    end = time.monotonic() + 60
    while alive := [pid for pid in pids if state_of(pid)[0] not in ("", "Z")]:
        assert time.monotonic() < end, f"still running: {alive}"
        time.sleep(0.01)


@pytest.mark.slow
def test_fresh_processes_come_to_the_same(tmp_path):
    """Nothing that the server has loaded or set changes a number: the ranks of a fresh start agree to the last bit."""
    forked = launch.run(workers.parity, world=2, args=(2,))
    with tempfile.TemporaryDirectory() as folder:
        launch.start("spawn", workers.parity, 2, folder, (2,))
        fresh = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for a, b in zip(forked, fresh, strict=True):
        assert list(a) == list(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True)
