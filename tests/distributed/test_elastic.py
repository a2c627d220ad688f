"""The elastic example under torchrun, while its agents and workers are killed and others join.

World size 1 → 2 → 1 → 2, and once more. What the faults leave is read from the run's own files: the example's log has a
line for each start, save and end, the record a header for each start and a line for each step.

The rendezvous' store is in the test's process, so that the agent that came first can be killed as well: an agent that
holds the store takes the others down with it. Agents and workers are forks of the server in `processes.py`, so that a
run does not get far ahead on a machine that takes long to import torch; the undisturbed run is a fresh process.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from processes import Processes, state_of, torchrun
from torch.distributed import TCPStore

import anybatch

EXAMPLE = Path(__file__).parents[2] / "examples" / "elastic_digits.py"
TOTAL, EVERY = 2000, 40
BASE_BATCHES = 4  # of each rank and step
SECONDS = 300  # for the whole test, on a machine many times slower than one where it takes a minute


class Cluster:
    """Agents, their workers, and the files of the run."""

    def __init__(self, folder):
        self.folder = folder
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = Processes(folder)
        self.agents = {}
        self.killed = []  # names of agents
        self.fired = []  # faults, in words
        self.deadline = time.monotonic() + SECONDS

    def join(self, name):
        """One more agent; returns where the log was before."""
        since = len(self.log())
        conf = "is_host=false,join_timeout=200,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
        options = [
            *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=100"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.store.port}", "--rdzv-id=digits"),
            *("--local-addr=127.0.0.1", f"--rdzv-conf={conf}"),
            *example(self.folder, "--min-step-seconds=0.05"),
        ]
        with mock.patch.dict(os.environ, environment(), clear=True):
            self.agents[name] = self.processes.start(torchrun, *options)
        return since

    def log(self, event=None):
        return [line for line in lines(self.folder / "log.jsonl") if event in (None, line["event"])]

    def until(self, condition, what):
        """Wait for a state of the run that can be seen in its files."""
        while not (seen := condition()):
            for name, agent in self.agents.items():
                if name not in self.killed and agent.exitcode not in (None, 0):
                    raise AssertionError(f"Agent {name} failed:\n{agent.text()[-5000:]}")
            if time.monotonic() > self.deadline:
                outputs = "\n".join(agent.text()[-3000:] for agent in self.agents.values())
                raise AssertionError(f"{what}: not seen in {SECONDS} seconds.\n{self.log()[-8:]}\n{outputs}")
            time.sleep(0.05)
        return seen

    def running(self, ranks, *, since):
        """The start lines, by rank, of `ranks` workers that started after the log's line `since` and have saved."""

        def look():
            log = self.log()[since:]
            assert not any(line["event"] == "end" for line in log), "the run ended before the last fault"
            starts = [i for i, line in enumerate(log) if line["event"] == "start"]
            last = [log[i] for i in starts[-ranks:]]
            together = {line["rank"] for line in last} == set(range(ranks)) and {ranks} == {n["ranks"] for n in last}
            return together and any(line["event"] == "saved" for line in log[starts[-1] :]) and last

        workers = self.until(look, f"{ranks} workers, after line {since} of the log")
        return {line["rank"]: line for line in workers}

    def agent_of(self, worker):
        return next(name for name, agent in self.agents.items() if agent.pid == worker["agent"])

    def kill_worker(self, worker):
        """SIGKILL a worker; its agent has to tell that it was this signal. Returns where the log was before."""
        since, agent = len(self.log()), self.agents[self.agent_of(worker)]
        os.kill(worker["pid"], signal.SIGKILL)
        said = f"exitcode: -9) local_rank: 0 (pid: {worker['pid']})"
        self.until(lambda: said in agent.text(), "the agent's word on its killed worker")
        self.fired.append(f"worker {worker['rank']} of agent {self.agent_of(worker)}")
        return since

    def kill_agent(self, worker, *, orphan):
        """SIGKILL an agent, and its worker too unless that is left an orphan, which has to end by itself."""
        since, name = len(self.log()), self.agent_of(worker)
        self.killed.append(name)
        assert self.agents[name].kill()
        if not orphan:
            os.kill(worker["pid"], signal.SIGKILL)
        self.until(lambda: not alive(worker["pid"]), "the end of the worker")
        self.fired.append(f"agent {name}{'' if orphan else ' with its worker'}")
        return since

    def close(self):
        """End every process that is left: an agent with its session, and workers of a killed one."""
        self.processes.close()
        for worker in self.log("start"):
            if alive(worker["pid"]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker["pid"], signal.SIGKILL)


def example(folder, *options):
    return [str(EXAMPLE), f"--folder={folder}", f"--total={TOTAL}", f"--save-every={EVERY}", *options]


def environment():
    """Without this, torch 2.13's late agents hang; and nothing of a launcher that runs the tests themselves."""
    mine = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    others = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in others} | mine


def lines(path):
    """The JSON lines of a file that a kill may have torn."""
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(text)


def alive(pid):
    """Whether the process is a fork of the server: not gone, not a zombie, and no other that was given its number."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return state_of(pid)[0] not in ("", "Z", "X") and "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()
    return False


def segments(path):
    """The record's steps between two headers, each with the number of ranks that its header tells."""
    found = []
    for line in lines(path):
        if line["kind"] == "header":
            found.append((line["config"]["ranks"], []))
        else:
            found[-1][1].append(line)
    return [(ranks, steps) for ranks, steps in found if steps]


def faults(cluster):
    """Let the run go through all its worlds."""
    one = cluster.running(1, since=cluster.join("A"))
    two = cluster.running(2, since=cluster.join("B"))
    two = cluster.running(2, since=cluster.kill_worker(of_agent(one[0]["agent"], two)))
    one = cluster.running(1, since=cluster.kill_agent(of_agent(one[0]["agent"], two), orphan=False))
    two = cluster.running(2, since=cluster.join("C"))
    two = cluster.running(2, since=cluster.kill_worker(two[0]))  # the one that saves
    cluster.running(1, since=cluster.kill_agent(of_agent(one[0]["agent"], two), orphan=True))
    cluster.running(2, since=cluster.join("D"))


def of_agent(pid, workers):
    return next(worker for worker in workers.values() if worker["agent"] == pid)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
def test_agents_and_workers_may_be_killed_and_join(tmp_path, capsys):
    began = time.monotonic()
    (tmp_path / "calm").mkdir()
    (tmp_path / "elastic").mkdir()
    calm = [sys.executable, *example(tmp_path / "calm")]
    cluster = Cluster(tmp_path / "elastic")
    undisturbed = subprocess.Popen(calm, env=environment(), stdout=subprocess.DEVNULL)
    try:
        faults(cluster)
        (end,) = cluster.until(lambda: cluster.log("end"), "the end")
        remaining = [agent for name, agent in cluster.agents.items() if name not in cluster.killed]
        cluster.until(lambda: all(agent.exitcode == 0 for agent in remaining), "the agents' exit")
        assert undisturbed.wait(timeout=SECONDS) == 0
    finally:
        undisturbed.kill()
        undisturbed.wait()
        cluster.close()

    (expected,) = [line for line in lines(tmp_path / "calm" / "log.jsonl") if line["event"] == "end"]
    worlds = segments(tmp_path / "elastic" / "record.jsonl")
    with capsys.disabled():
        print(f"\n{len(cluster.fired)} faults fired: {', '.join(cluster.fired)}")
        print("ranks and tau at each start:", [(s["ranks"], round(s["tau"])) for s in cluster.log("start")])
        print(f"tau {end['tau']:.1f} of {TOTAL} after {end['step']} steps, accuracy {end['accuracy']:.1f} %;", end=" ")
        print(f"undisturbed: {expected['step']} steps, {expected['accuracy']:.1f} %", end="; ")
        print(f"{time.monotonic() - began:.0f} seconds")
    assert len(cluster.fired) == 4

    check_worlds([ranks for ranks, _ in worlds])
    check_clock(worlds, cluster.log(), end)
    check_scale_and_gain(worlds)
    assert abs(end["accuracy"] - expected["accuracy"]) <= 1.5

    kept = contents(tmp_path / "calm")
    again = subprocess.run(calm, env=environment(), check=True, stdout=subprocess.PIPE)
    assert b"finished" in again.stdout
    assert contents(tmp_path / "calm") == kept


def check_worlds(ranks):
    """All worlds were there. A slow restart may show one rank for a moment more often."""
    rest = iter(ranks)
    assert all(world in rest for world in (1, 2, 1, 2, 1, 2)), ranks
    assert ranks[-1] == 2


def check_clock(worlds, log, end):
    """tau goes on from the last checkpoint, to the last bit; nothing is left out or counted twice."""
    at = {0: 0.0}
    for _, steps in worlds:
        at = {
            step: tau for step, tau in at.items() if step < steps[0]["step"]
        }  # what came after the checkpoint is lost
        for step in steps:
            assert step["tau"] == at[step["step"] - 1] + step["iterations"]
            assert step["step"] not in at
            at[step["step"]] = step["tau"]
    assert list(at) == list(range(end["step"] + 1))
    assert at[end["step"]] == end["tau"]
    assert at[end["step"] - 1] < TOTAL <= end["tau"]
    recorded = {(0, 0.0)} | {(step["step"], step["tau"]) for _, steps in worlds for step in steps}
    saved = {"step": 0, "tau": 0.0}
    for line in log:
        if line["event"] == "saved":
            saved = line
        elif line["event"] == "start":
            assert (line["step"], line["tau"]) in recorded
            assert line["step"] >= saved["step"], "went back further than to the last checkpoint"


def check_scale_and_gain(worlds):
    """S follows the ranks, and the gain is that of S at once: the averages are those of one base batch."""
    for i, (ranks, steps) in enumerate(worlds):
        for step in steps:
            assert step["scale"] == step["count"] == BASE_BATCHES * ranks
            full = anybatch.gain(step["variance"], step["sqnorm"], BASE_BATCHES * ranks)
            assert step["gain"] == pytest.approx(full ** (1 - math.sqrt(0.5) ** (step["step"] + 1)), rel=1e-9)
            assert not step["skipped"]
        if i:
            assert steps[0]["variance"] != steps[0]["raw_variance"], "the averages began anew"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
