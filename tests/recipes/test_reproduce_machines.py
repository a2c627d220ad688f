"""Where the experiments' trainings run: devices, processes, several machines, kills; and what is said before."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import anybatch
from recipes import reproduce
from recipes.digits import Digits
from recipes.paper import jobs, plan, runs
from recipes.paper.machine import Machine, devices_in, machine_here
from recipes.training.task import DataError

ROOT = Path(__file__).parents[2]
RUN = runs.Run("digits", False, None, "adascale", "4", 0, 60, 2)


# ---- the cache's keys ----


def test_a_run_that_was_cached_before_these_options_is_found():
    """The key as it was when a run had fourteen fields."""
    fields = {"task": "digits", "tiny": False, "data": None, "rule": "adascale", "scale": "4", "seed": 0, "total": 60,
              "evaluations": 2, "lr": None, "last_rate": None, "steps": None, "decays": None, "estimator": None,
              "smoothing": None, "versions": [anybatch.__version__, torch.__version__]}  # fmt: skip
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
    assert RUN.key == f"digits-adascale-S4-seed0-{digest}"


def test_what_changes_results_changes_the_key():
    others = [replace(RUN, precision="bf16"), replace(RUN, micro_batch=4), replace(RUN, decays="constant")]
    assert len({one.key for one in (RUN, *others)}) == 4


@pytest.mark.parametrize(
    ("scale", "given", "processes", "micro_batch"),
    [("4", None, 4, None), ("1", None, 4, 2), ("1", 8, 1, None), ("4", 16, 2, 16), ("32,64@0.25", None, 8, None)],
)
def test_the_micro_batch_of_several_processes_is_another_one_only_where_it_has_to_be(
    scale, given, processes, micro_batch
):
    """The digits' base batch is 8; one process takes all of it at a time."""
    assert replace(RUN, scale=scale, micro_batch=given).on(processes, Digits()).micro_batch == micro_batch


def test_the_command_beside_the_numbers_says_what_decides_them():
    given = reproduce.parser().parse_args(["table2", "--processes", "8", "--jobs", "3", "--workers", "2", "--compile"])
    assert reproduce._command(given, reproduce.parser()) == "python -m recipes.reproduce table2 --processes 8"


# ---- places ----


@pytest.mark.parametrize(
    ("devices", "job_count", "processes", "places"),
    [
        ("0123", 4, 1, ["0", "1", "2", "3"]),
        ("0123", 2, 2, ["0,1", "2,3"]),
        ("0123", 1, 4, ["0,1,2,3"]),
        ("57", 4, 1, ["5", "7", "5", "7"]),
        ("012", 2, 2, ["0,1", "2,0"]),
        ("", 3, 1, ["", "", ""]),
    ],
)
def test_each_job_has_a_place_of_its_own(devices, job_count, processes, places):
    assert Machine(tuple(devices), job_count, processes).places() == places


@pytest.mark.parametrize(
    ("named", "count", "devices"),
    [
        (None, 3, ("0", "1", "2")),
        ("2, 5", 2, ("2", "5")),
        ("", 0, ()),
        ("0,1", 0, ()),
        ("GPU-a1,GPU-b2", 2, ("GPU-a1", "GPU-b2")),
        ("1,-1,2", 1, ("1",)),
    ],
)
def test_the_devices_are_those_that_are_visible(named, count, devices):
    assert devices_in(named, count=count) == devices


def test_there_is_a_job_for_every_place(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    here = {"jobs": None, "workers": 3, "compiled": True}
    assert machine_here(processes=1, **here) == Machine(("4", "5", "6", "7", "8"), 5, 1, 3, True)
    assert machine_here(processes=2, **here).places() == ["4,5", "6,7"]
    with pytest.raises(anybatch.InvalidValueError, match=r"--processes 6 is more than the 5 device"):
        machine_here(processes=6, **here)
    with pytest.raises(anybatch.InvalidValueError, match="--jobs and --processes"):
        machine_here(processes=1, jobs=0, workers=None, compiled=False)


def _seen(one, path, machine):
    """What a job sees, in place of a training."""
    with path.open("a") as file:
        file.write(f"{os.environ['CUDA_VISIBLE_DEVICES']}\n")
    until = time.monotonic() + 30
    while len(set(path.read_text().split())) < machine.jobs and time.monotonic() < until:
        time.sleep(0.05)  # until all have a job


@pytest.mark.slow
def test_jobs_at_a_time_see_devices_of_their_own(tmp_path):
    machine = Machine(("7", "9"), 2)
    with jobs.pool(machine, most=2) as workers:
        for future in [workers.submit(jobs.in_place, _seen, RUN, tmp_path / "seen", machine) for _ in range(2)]:
            future.result()
    assert sorted((tmp_path / "seen").read_text().split()) == ["7", "9"]


@pytest.mark.slow
def test_a_training_of_two_processes_is_that_of_one(tmp_path):
    """By torchrun, with gloo on the CPU; and it is the same entry in the cache."""
    one = replace(RUN, total=24)
    (two,) = jobs.train_all([one], cache=tmp_path, machine=Machine(processes=2))
    assert two[1]["ranks"] == 2
    alone = tmp_path / "alone"
    jobs.train(one, alone, Machine())
    found = runs.cached(one, alone)
    assert found["ranks"] == 1
    assert two[1]["iterations"] == found["iterations"]
    assert two[1]["loss"] == pytest.approx(found["loss"], rel=1e-3)
    assert runs.cached(one, tmp_path) == two[1]
    assert not list(tmp_path.glob("*/checkpoint*"))


# ---- several machines, and kills ----


def test_a_run_that_another_machine_is_at_is_left_to_it(tmp_path):
    folder = tmp_path / RUN.key
    folder.mkdir()
    with jobs._claimed(folder / "claim", wait=False) as mine:
        assert mine
        assert jobs._train(RUN, tmp_path, Machine(), wait=False) is None
    assert jobs._train(RUN, tmp_path, Machine(), wait=True)["iterations"] > 15


@pytest.mark.slow
def test_after_a_kill_nothing_runs_on_and_the_same_command_goes_on(tmp_path):
    one, cache = replace(RUN, scale="2", total=400, evaluations=4), tmp_path / "cache"
    program = (
        "from pathlib import Path; from recipes.paper.jobs import train_all\n"
        "from recipes.paper.machine import Machine; from recipes.paper.runs import Run\n"
        f"list(train_all([{one}], cache=Path({str(cache)!r}), machine=Machine()))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    folder, until = cache / one.key, time.monotonic() + 100
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with jobs._claimed(folder / "claim", wait=True):  # its worker lets go of it, by ending
        assert not (folder / "summary.json").exists()
        before = torch.load(folder / "checkpoint.pt", weights_only=True)["controller"]["steps"]
    assert runs.Run(**json.loads((folder / "run.json").read_text())) == one
    straight = tmp_path / "straight"
    jobs.train(one, cache, Machine())
    jobs.train(one, straight, Machine())
    mine, other = (runs.cached(one, place) for place in (cache, straight))
    steps = [len(anybatch.read_record(place / one.key / "record.jsonl").steps) for place in (cache, straight)]
    assert 0 < before < mine["iterations"]
    assert steps[0] == steps[1] == mine["iterations"]
    assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_processes_that_end_badly_are_one_line(tmp_path, monkeypatch):
    class Ended:
        def __init__(self, *_, **__):
            pass

        def wait(self):
            return 3

    monkeypatch.setattr(jobs.subprocess, "Popen", Ended)
    with pytest.raises(DataError, match=r"digits-adascale-S4-.*: its 2 processes ended with code 3"):
        jobs.in_place(jobs.train, RUN, tmp_path, Machine(processes=2))
    with pytest.raises(DataError, match="the same command goes on"), jobs.pool(Machine(), most=1):
        raise BrokenProcessPool


def test_what_one_run_is_wrong_in_is_said_before_the_others_are_done(monkeypatch, capsys):
    """They may take days."""
    said = []
    monkeypatch.setattr(jobs.ProcessPoolExecutor, "shutdown", lambda *_, **__: said.append(capsys.readouterr().err))
    with pytest.raises(DataError, match="a file is wrong"), jobs.pool(Machine(jobs=2), most=2):
        raise DataError("a file is wrong")
    assert said[0] == "a file is wrong\nWhat is in training is finished first, and nothing else begun.\n"


def test_a_process_has_one_run_s_model_at_a_time(tmp_path, monkeypatch):
    models, make = [], Digits.model

    def noting(task):
        assert not [known for known in models if known() is not None]
        models.append(weakref.ref(model := make(task)))
        return model

    monkeypatch.setattr(Digits, "model", noting)
    for seed in (0, 1):
        jobs.train(replace(RUN, seed=seed, total=8), tmp_path, Machine())
    assert len(models) == 2


# ---- what it says before it starts ----


@pytest.mark.parametrize(
    ("rule", "scale", "processes", "least", "most"),
    [
        ("adascale", "8", 1, (50, 400), (400, 3200)),
        ("adascale", "8", 2, (50, 200), (400, 1600)),
        ("lsw", "8", 1, (50, 400), (50, 400)),
        ("identity", "8", 1, (400, 3200), (400, 3200)),
        ("lsw", "4,8@0.25,2@0.5", 1, (25 + 12.5 + 100, 400), (25 + 12.5 + 100, 400)),
        ("adascale", "0.5", 1, (400, 400), (800, 800)),
    ],
)
def test_steps_and_micro_batches_of_a_run(rule, scale, processes, least, most):
    """400 base iterations of 8: by hand."""
    one = replace(RUN, rule=rule, scale=scale, total=400)
    found = plan.work(one, Digits(), processes=processes)
    assert [(bound.steps, bound.micro_batches) for bound in found] == [least, most]


def test_lsw_plus_is_as_long_as_adascale():
    stretched = replace(RUN, rule="lsw+", scale="8", total=400)
    assert plan.work(stretched, Digits(), processes=1) == plan.work(
        replace(RUN, scale="8", total=400), Digits(), processes=1
    )
    known = plan.work(replace(stretched, steps=100), Digits(), processes=1)
    assert known == (plan.Work(100, 800), plan.Work(100, 800))


def test_the_plan_counts_what_is_missing(tmp_path, monkeypatch):
    """By hand: AdaScale at 1 (60 steps) and 4 (15 to 60), LSW (15) and LSW+ (15 to 60); a micro-batch a base batch."""
    cost = plan.Cost(step=1.0, micro_batch=10.0, evaluation=100.0, memory=3 * 10**9, checkpoint=10**9)
    monkeypatch.setattr(plan, "costs", lambda *_: cost)
    wanted = [replace(RUN, scale=scale, rule=rule) for scale, rule in
              (("1", "adascale"), ("4", "adascale"), ("4", "lsw"), ("4", "lsw+"))]  # fmt: skip
    asked = {"cache": tmp_path, "machine": Machine(("0", "1"), 2), "task": Digits()}
    words = plan.told(wanted, **asked)
    least = 60 * 11 + 3 * (15 + 60 * 10) + 8 * 100
    most = 60 * 11 + 2 * (60 + 240 * 10) + (15 + 600) + 8 * 100
    assert f"Time: {least / 3600:.3g} to {most / 3600:.3g} device-hours" in words
    assert f"{least / 7200:.3g} to {most / 7200:.3g} hours by the clock" in words
    assert "4 of 4 runs are to be trained, 2 at a time, each on 1 device." in words
    assert "Steps: 105 to 195." in words
    assert "Memory: 3 GB a device. Disk: up to 4 GB." in words
    jobs.train(wanted[2], tmp_path, Machine())
    assert "3 of 4 runs" in plan.told(wanted, **asked)
    for one in (wanted[0], wanted[1], replace(wanted[3], steps=20)):
        jobs.train(one, tmp_path, Machine())
    assert plan.told([*wanted[:3], replace(wanted[3], steps=20)], **asked) == ""


def test_the_plan_measures_each_size_of_micro_batch(tmp_path, monkeypatch):
    """By hand: two processes cut scale 1's 8 into 4 and 4, and take the 32 of scale 4 by 8, two times."""
    takes = {4: 1.0, None: 100.0}
    cost = lambda one, _: plan.Cost(0.0, takes[one.micro_batch], 0.0, int(takes[one.micro_batch] * 1e9), 0)  # noqa: E731
    monkeypatch.setattr(plan, "costs", cost)
    machine = Machine(("0", "1"), 1, 2)
    wanted = [replace(RUN, scale=scale, rule="lsw").on(2, Digits()) for scale in ("1", "4", "4", "1")]
    words = plan.told(wanted, cache=tmp_path, machine=machine, task=Digits())
    seconds = 60 * 1 + 15 * 2 * 100  # the same run twice is one
    assert f"Time: {2 * seconds / 3600:.3g} device-hours, {seconds / 3600:.3g} hours by the clock." in words
    assert "1 s for each micro-batch of 4," in words
    assert "100 s for each micro-batch of 8," in words
    assert "Memory: 1e+02 GB a device." in words


def test_a_measured_step_has_both_its_parts(tmp_path, monkeypatch):
    """A step that sleeps for each micro-batch."""
    monkeypatch.setattr(plan, "SECONDS", 0.0)
    loss = Digits.loss
    monkeypatch.setattr(Digits, "loss", lambda *given: time.sleep(0.02) or loss(*given))
    plan.measure(RUN, tmp_path / "cost.json", Machine())
    cost = plan.Cost(**json.loads((tmp_path / "cost.json").read_text()))
    assert 0.02 <= cost.micro_batch < 0.06
    assert cost.step < 0.06
    weights = sum(p.numel() for p in Digits().model().parameters())
    assert cost.checkpoint == 2 * 4 * weights  # momentum is as large as the weights
    assert cost.memory > 10**7
    assert cost.evaluation > 0


def test_plan_stops_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "costs", lambda *_: plan.Cost(1, 1, 1, 1, 1))
    monkeypatch.setattr(reproduce, "train_all", lambda *_, **__: pytest.fail("trained"))
    arguments = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--plan"]
    for what, number in (
        ("table2", 80),
        ("fig1", 20),
        ("fig2", 6),
        ("fig3", 30),
        ("fig4", 25),
        ("fig5", 4 * 169),
        ("decays", 55),
    ):
        assert reproduce.main([what, *arguments]) == 0
        assert f"{number} of {number} runs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_fit_are_said_before_anything_runs(tmp_path, capsys):
    common = ["--cache", str(tmp_path), "--out", str(tmp_path)]
    for arguments, words in (
        (["fig2", "--processes", "2"], "leave out --processes"),
        (["table2", "--micro-batch", "5"], "--micro-batch"),
        (["table2", "--jobs", "0"], "--jobs"),
    ):
        assert reproduce.main([*arguments, *common]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_options_reach_the_training(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(jobs, "run", lambda task, options: given.append(options))
    jobs.train(replace(RUN, precision="bf16", micro_batch=4), tmp_path, Machine(workers=2, compile=True))
    (options,) = given
    assert (options.precision, options.micro_batch, options.workers, options.compile) == ("bf16", 4, 2, True)
    assert asdict(options)["scale"] == "4"
