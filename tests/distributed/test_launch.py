"""The launcher: what its ranks share with the test, and that an error of one ends all of them and reaches the test."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from processes import Processes, state_of, until

import anybatch
from distributed import launch
from distributed import launch_workers as mine

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")


@pytest.fixture
def processes(tmp_path):
    started = Processes(tmp_path)
    yield started
    started.close()


def test_ranks_are_processes_of_their_own_with_the_tests_surroundings(monkeypatch, tmp_path):
    for value in ("one", "two"):  # the server has been started before the second
        monkeypatch.setenv("ANYBATCH_LAUNCH", value)
        monkeypatch.chdir(tmp_path)
        found = launch.run(mine.environment, world=3, args=("ANYBATCH_LAUNCH",))
        shared, pids, worlds = zip(*found, strict=True)
        assert set(shared) == {(value, str(tmp_path), anybatch.__file__, 1, True)}
        assert len({*pids, os.getpid()}) == 4
        assert set(worlds) == {3}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (mine.fails, r"^RuntimeError: Rank 1: Traceback(.*\n)+.*, in fails\n.*\nZeroDivisionError: of rank 1"),
        (mine.dies, r"Exit codes: \[.*, -9\]"),
        (mine.hangs, r"(?s)still running after 5 s.*launch_workers\.py., line \d+ in hangs"),
    ],
    ids=["fails", "dies", "hangs"],
)
@linux
def test_a_rank_that_fails_dies_or_hangs_fails_the_test_and_leaves_no_process(function, said, tmp_path):
    with pytest.raises(AssertionError, match=said):
        launch.run(function, world=2, args=(str(tmp_path),), seconds=5 if function is mine.hangs else launch.SECONDS)
    gone(tmp_path)


def gone(folder):
    """Both ranks and the process that forked them have ended."""
    pids = {int(path.name) for path in folder.iterdir()}
    assert len(pids) == 3
    until(lambda: all(state_of(pid)[0] in ("", "Z") for pid in pids), "the end of all")


@linux
@pytest.mark.slow
def test_a_killed_test_leaves_no_process(processes, tmp_path):
    folder = tmp_path / "ranks"
    folder.mkdir()
    test = processes.start(launch.run, mine.hangs, world=2, args=(str(folder),))
    until(lambda: len(list(folder.iterdir())) == 3, "the ranks")
    assert test.kill()
    gone(folder)


@pytest.mark.slow
def test_fresh_processes_come_to_the_same(tmp_path):
    """Nothing that the server has loaded or set changes a number: the ranks of a fresh start agree to the last bit."""
    forked = launch.run(mine.training, world=2)
    with tempfile.TemporaryDirectory() as folder:
        launch.start("spawn", mine.training, 2, folder, ())
        fresh = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for ours, theirs in zip(forked, fresh, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
