"""The experiments of the paper run from one command, are cached, and are drawn."""

import importlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import anybatch
from recipes import reproduce
from recipes.paper import gains, jobs, plan, runs, wanted
from recipes.paper.machine import Machine
from recipes.training.options import TASKS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    return folder / "cache", folder / "out"


@pytest.fixture
def run(folders, monkeypatch, capsys):
    """`reproduce.py` on a short run of the digits, in this process."""
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", _Here)
    monkeypatch.setattr(plan, "SECONDS", 0.0)
    cache, out = folders

    def call(what, *arguments):
        common = ["--total", "80", "--seeds", "2", "--evaluations", "4", "--cache", str(cache), "--out", str(out)]
        code = reproduce.main([what, *common, *arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        assert (out / f"digits-{what}.png").stat().st_size > 5000
        return json.loads((out / f"digits-{what}.json").read_text())["results"], captured.out

    return call


class _Here:
    """An executor that does the work at once, in this process."""

    def __init__(self, *_, **__):
        torch.set_num_threads(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def shutdown(self, **_):
        pass

    def submit(self, function, *arguments, **named):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments, **named))
        return future


def test_table_2_has_a_row_for_each_rule_and_scale_and_trains_once(run, monkeypatch):
    rows, printed = run("table2", "--scales", "4")
    assert [(row["scale"], row["rule"]) for row in rows] == [
        ("1", "adascale"), ("4", "adascale"), ("4", "lsw"), ("4", "lsw+")
    ]  # fmt: skip
    one, adascale, lsw, stretched = rows
    assert one["iterations"] == 80
    assert lsw["iterations"] == 20
    assert 20 < adascale["iterations"] < 80
    assert stretched["iterations"] == adascale["iterations"]
    assert adascale["mean_gain"] == pytest.approx(80 / adascale["iterations"], rel=0.06)
    assert "lsw+" in printed
    monkeypatch.setattr(jobs, "in_place", lambda *_: pytest.fail("trained or measured again"))
    again, _ = run("table2", "--scales", "4")
    assert again == rows


def test_a_stopped_experiment_goes_on(run, folders):
    rows, _ = run("table2", "--scales", "4")
    for summary in folders[0].glob("*-adascale-S4-seed1-*/summary.json"):
        summary.unlink()
    again, _ = run("table2", "--scales", "4")
    assert again == rows


def test_a_run_of_other_data_or_versions_is_another_one(monkeypatch):
    def run(data):
        return runs.Run("cifar10", True, data, "adascale", "1", 0, 1, 1)

    assert len({run(data).key for data in (None, "/data/cifar10", "made/cifar10")}) == 3
    assert run("made/cifar10").key == run("made/../made/cifar10").key
    before = run(None).key
    monkeypatch.setattr(anybatch, "__version__", "none")
    assert run(None).key != before


def test_a_run_that_fails_is_not_waited_for(tmp_path, monkeypatch):
    stopped, trained = threading.Event(), []

    class Threads(ThreadPoolExecutor):
        def __init__(self, *_, **__):
            super().__init__(1)

        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait=wait)

    def train(one, *_, **__):
        if one.scale == "8":
            raise anybatch.InvalidValueError("no")
        stopped.wait()
        trained.append(one)

    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(jobs, "_train", train)
    asked = [runs.Run("digits", False, None, "adascale", s, seed, 1, 1) for seed in range(5) for s in ("1", "8")]
    with pytest.raises(anybatch.InvalidValueError, match="no"):
        list(jobs.train_all(asked, cache=tmp_path, machine=Machine()))
    assert len(trained) <= 1  # the one that had begun


def test_the_file_tells_the_command_and_a_tiny_run_has_its_own(run, folders):
    run("fig1", "--scale", "8")
    reproduce.main(["fig1", "--task", "digits", "--tiny", "--total", "8", "--seeds", "1", "--scale", "2",
                    "--jobs", "1", "--workers", "0", "--cache", str(folders[0]), "--out", str(folders[1])])  # fmt: skip
    commands = {path.name: json.loads(path.read_text())["command"] for path in folders[1].glob("*fig1.json")}
    assert commands == {
        "digits-fig1.json": "python -m recipes.reproduce fig1 --scale 8 --seeds 2 --total 80 --evaluations 4",
        "digits-tiny-fig1.json": "python -m recipes.reproduce fig1 --tiny --scale 2 --seeds 1 --total 8",
    }


@pytest.mark.parametrize(("words", "shown"), [("8,2", "1,2,8"), ("128,64,32,16,8", None)])
def test_the_command_has_no_defaults(words, shown, monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "told", lambda *_, **__: "")
    monkeypatch.setitem(reproduce.EXPERIMENTS, "table2", lambda lab: seen.append(lab.given.command))
    reproduce.main(["table2", "--scales", words])
    assert seen == ["python -m recipes.reproduce table2" + (f" --scales {shown}" if shown else "")]


@pytest.mark.filterwarnings("ignore:At scale .* an example is worth:anybatch.AnybatchWarning")
def test_figures_1_3_and_4(run):
    rows, _ = run("fig1", "--scale", "8")
    steps = {row["rule"]: row["iterations"] for row in rows if row["scale"] == "8"}
    assert steps["linear"] < steps["adascale"] < steps["identity"] == 80
    curves, _ = run("fig3", "--scales", "4")
    assert set(curves) == {"1", "4"}
    assert curves["1"]["largest_distance_after_a_quarter"] == 0
    rows, _ = run("fig4")
    assert sum("@" in row["scale"] for row in rows) == 4


def test_figure_5_counts_the_schedules_within_one_point(run, monkeypatch):
    monkeypatch.setattr(wanted, "GRID", 2)
    found, _ = run("fig5", "--scale", "4", "--seeds", "1")
    assert set(found["metric"]) == {"scale 1", "AdaScale, S = 4", "LSW, S = 4", "direct search, S = 4"}
    for name, rows in found["metric"].items():
        flat = [value for row in rows for value in row]
        assert len(flat) == 4
        assert found["area"][name] == sum(v >= found["best"]["scale 1"] - 1 for v in flat)


def test_figure_2_compares_gains(run, monkeypatch):
    options, begin = [], gains.Training
    monkeypatch.setattr(gains, "Training", lambda *given: options.append(given[1]) or begin(*given))
    found, _ = run("fig2", "--scale", "4", "--batches", "50", "--workers", "0")
    assert [(one.workers, one.compile) for one in options] == [(0, False)] * 6
    assert len(found["offline"]) == 12
    assert all(1 <= point[key] <= 4 for point in found["offline"] for key in ("online", "offline"))
    assert all(1 <= gain <= 4 for _, gain in found["tied"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:One gradient a step at scale")  # the transformer's batches are not full
@pytest.mark.parametrize("task", [task for task in TASKS if task != "digits"])
def test_table_2_of_every_task(task, tmp_path, monkeypatch, capsys):
    """Four steps of each tiny task, in another precision and in half micro-batches; the digits are above."""
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", _Here)
    monkeypatch.setattr(plan, "costs", lambda *_: plan.Cost(1.0, 1.0, 1.0, 1, 1))
    module = importlib.import_module(TASKS[task].split(":")[0])
    module.make(tmp_path / "data", size="tiny", seed=0)
    half = {"language": 256, "transformer": 128, "cifar10": 8, "imagenet": 8, "speech": 4, "yolo": 4}[task]
    words = [
        "--task",
        task,
        "--tiny",
        "--data",
        str(tmp_path / "data"),
        "--total",
        "4",
        "--seeds",
        "1",
        "--scales",
        "2",
    ]
    words += ["--precision", "bf16", "--micro-batch", str(half), "--evaluations", "1", "--jobs", "1"]
    where = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    assert reproduce.main(["table2", *words, *where]) == 0, capsys.readouterr().err
    assert "4 of 4 runs are to be trained" in capsys.readouterr().err
    content = json.loads((tmp_path / f"{task}-tiny-table2.json").read_text())
    assert [(row["scale"], row["rule"]) for row in content["results"]] == [
        ("1", "adascale"), ("2", "adascale"), ("2", "lsw"), ("2", "lsw+")
    ]  # fmt: skip
    assert f"--precision bf16 --micro-batch {half}" in content["command"]
    assert all(2 <= row["iterations"] <= 5 for row in content["results"])
    assert all(math.isfinite(row["test_loss"]) for row in content["results"])
    for path in (tmp_path / "cache").glob("*/summary.json"):
        summary = json.loads(path.read_text())
        assert (summary["precision"], summary["micro_batch"]) == ("bf16", half)


def test_true_moments_are_those_of_a_plain_loop():
    base = runs.Run("digits", False, None, "adascale", "1", 0, 80, 1)
    task = runs.task_of(base)
    torch.manual_seed(0)
    net = task.model().double()
    task.collate = lambda examples: [t.double() if t.is_floating_point() else t for t in _default(examples)]
    found = gains.true_moments(task, net, batches=5, seed=3)
    stream = task.batches(task.base_batch, seed=3, rank=0, ranks=1)
    samples = []
    for _ in range(5):
        net.zero_grad()
        task.loss(net, next(stream)).backward()
        samples.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    samples = torch.stack(samples)
    variance = samples.var(0, unbiased=True).sum().item()
    assert found.variance == pytest.approx(variance, rel=1e-9)
    assert found.sqnorm == pytest.approx(samples.mean(0).square().sum().item() - variance / 5, rel=1e-9)


def _default(examples):
    return torch.utils.data.default_collate(examples)


def test_bad_data_is_one_line_and_exit_code_2(capsys, tmp_path):
    assert reproduce.main(["table2", "--task", "yolo", "--data", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_a_tied_rule_takes_the_common_gain():
    rule = gains.Tied(tie=gains.Tie(gain=4.0))
    assert rule(scale=8, gain=2.0, clock=anybatch.Clock(), exponent=0.5) == anybatch.Scaling(2.0, 4.0)
