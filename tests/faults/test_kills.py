"""Trainings that are killed at any moment, under torchrun's agent and in worlds that change their size."""

import functools
import os
import signal
import time

import oracle
import pytest
import torch
from processes import Processes, state_of, until

import anybatch
from faults import jobs
from faults.ledger import json_lines, steps_of

LONG_RUN = {"total": 400.0, "save_every": 15, "pause": 0.004}  # about 130 steps, a second


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of the run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    started = Processes(folder)
    started.start(jobs.agent, folder, **LONG_RUN).result()
    started.close()
    return folder


def test_a_run_under_torchruns_agent_is_the_undisturbed_one_whatever_is_killed(
    faults, processes, times, rng, undisturbed, tmp_path
):
    for i in range(times(4, 100)):
        folder = tmp_path / str(i)
        folder.mkdir()
        train_and_kill(processes, folder, rng, kills=3, fired=faults.fired)
        check_same_run(faults, folder, undisturbed)
        faults.survived()


def train_and_kill(processes, folder, rng, *, kills, fired):
    """Up to `kills` workers, or agents with their workers, at random moments of start-up, steps and saves."""
    log, since = folder / "log.jsonl", 0
    agent = processes.start(jobs.agent, folder, **LONG_RUN)
    for _ in range(kills):

        def born(since=since):
            return [line for line in json_lines(log)[since:] if line["event"] == "born"][-2:]

        until(lambda: len(born()) == 2 or agent.exitcode is not None, "two workers")
        time.sleep(rng.uniform(0, 0.9))
        workers = {line["rank"]: line["pid"] for line in born()}
        if agent.exitcode is not None or any(state_of(pid)[0] in ("", "Z") for pid in workers.values()):
            break  # the run is over, or a rendezvous has failed and is tried again
        since, victim = len(json_lines(log)), rng.choice([0, 1, "agent"])
        if victim == "agent":
            assert agent.kill()
            fired()
            for pid in workers.values():
                if state_of(pid)[0] not in ("", "Z"):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: all(state_of(pid)[0] in ("", "Z") for pid in workers.values()), "the workers' end")
            agent = processes.start(jobs.agent, folder, **LONG_RUN)
        elif killed(workers[victim], agent):
            fired()
    assert agent.join() == 0, agent.text()[-3000:]


def killed(pid, agent):
    """SIGKILL a worker; whether it ended by that, by what Linux keeps of it or by the word of its agent."""
    os.kill(pid, signal.SIGKILL)
    while (state := state_of(pid))[0] not in ("", "Z"):
        pass
    if state[0] == "Z":
        return state[1] == signal.SIGKILL
    said = f"exitcode: {-signal.SIGKILL}) local_rank: "
    time.sleep(0.2)
    return any(said in line and f"(pid: {pid})" in line for line in agent.text().splitlines())


def check_same_run(faults, folder, expected):
    mine, whole = (anybatch.read_record(each / "record.jsonl") for each in (folder, expected))
    faults.steps([step.step for step in mine.steps], [step.step for step in whole.steps])
    faults.same(steps_of(mine), steps_of(whole), "record")
    faults.same(torch.load(folder / "checkpoint.pt"), torch.load(expected / "checkpoint.pt"), "checkpoint")
    ends = {
        line["digest"] for each in (folder, expected) for line in json_lines(each / "log.jsonl") if "digest" in line
    }
    assert len(ends) == 1, "the ranks ended differently"


def test_the_world_may_change_its_size_at_every_restart(faults, processes, times, rng, tmp_path):
    for i in range(times(1, 10)):
        folder = tmp_path / str(i)
        folder.mkdir()
        for ranks in (4, 3, 2):
            world = processes.world(jobs.train, ranks, folder, save_every=8, pause=0.02)
            saves = functools.partial(saved, folder / "log.jsonl", ranks)
            until(saves, f"a save of {ranks} ranks")
            time.sleep(rng.uniform(0, 0.1))
            faults.fired(sum([child.kill() for child in world]))
        processes.results(jobs.train, 4, folder, save_every=8)
        check_against_oracle(faults, folder)
        faults.survived()


def saved(log, ranks):
    """Whether a world of `ranks` has saved, and is the last to have started."""
    lines = json_lines(log)
    starts = [i for i, line in enumerate(lines) if line["event"] == "start"]
    return (
        starts and lines[starts[-1]]["ranks"] == ranks and any(line["event"] == "saved" for line in lines[starts[-1] :])
    )


def check_against_oracle(faults, folder):
    """One process with float64 and the batches that the record tells: the same gains, clock and weights."""
    steps = anybatch.read_record(folder / "record.jsonl").steps
    faults.steps([step.step for step in steps], range(1, len(steps) + 1))
    counts = [step.count for step in steps]
    assert list(dict.fromkeys(counts)) == [8, 6, 4], "each world has taken steps"
    assert counts[-1] == 8, "the last one too"
    gains, taus, weights = oracle.adascale(steps=len(steps), counts=counts, several=True)
    assert [step.gain for step in steps] == pytest.approx(gains, rel=1e-6)
    assert [step.tau for step in steps] == pytest.approx(taus, rel=1e-6)
    final = torch.load(folder / "checkpoint.pt")
    for mine, expected in zip(final["model"].values(), weights, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    assert oracle.TOTAL <= final["controller"]["tau"] < oracle.TOTAL + counts[-1]
