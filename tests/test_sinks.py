"""Trackers and functions beside the record: what they are told, and that none of them can stop the training."""

import doctest
import math

import pytest
import torch

import anybatch
from anybatch import sinks


def training(record, **options):
    """A model with its controller, and a function that takes one step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, record=record, **{"scale": "count", **options})

    def take(factor=1.0):
        for _ in range(2):
            (factor * model(torch.randn(3, 2)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    return controller, take


def test_a_function_is_told_what_the_file_is_told(tmp_path):
    told = []
    controller, take = training([tmp_path / "r.jsonl", told.append])
    take()
    take()
    take(factor=math.inf)
    controller.log(accuracy=0.5, loss=math.nan)
    run = anybatch.read_record(tmp_path / "r.jsonl")
    lines = [{k: v for k, v in vars(s).items() if k != "per_layer"} for s in run.steps]
    expected = [{f"anybatch/{k}": v for k, v in line.items() if math.isfinite(v)} for line in lines]
    assert told[:3] == expected
    assert told[3] == {"anybatch/accuracy": 0.5, "anybatch/step": 2, "anybatch/tau": controller.tau}
    assert [line["anybatch/skipped"] for line in told[:3]] == [0, 0, 1]
    assert all(type(value) in (int, float) for line in told for value in line.values())


def test_there_may_be_several_and_each_may_change_what_it_is_told(tmp_path):
    told = []
    own = anybatch.RunRecord(tmp_path / "own.jsonl")
    controller, take = training((dict.clear, told.append, own, str(tmp_path / "r.jsonl")))
    take()
    assert told[0]["anybatch/step"] == 1
    controller.detach()
    own.write(anybatch.read_record(own.path).steps[0])  # still open: it was the user's
    assert anybatch.read_record(tmp_path / "r.jsonl").steps == anybatch.read_record(own.path).steps[:1]
    take()
    assert len(told) == 1


def test_a_sink_that_raises_is_dropped_with_one_warning(tmp_path):
    told, calls = [], []

    def broken(values):
        calls.append(values)
        if len(calls) == 2:
            raise ConnectionError("no route to the tracker")

    controller, take = training([broken, tmp_path / "r.jsonl", told.append])
    take()
    with pytest.warns(anybatch.AnybatchWarning, match="broken raised ConnectionError: no route") as caught:
        take()
        take()
        controller.log(accuracy=1.0)
    assert (len(caught), len(calls), len(told), controller.steps) == (1, 2, 4, 3)
    assert len(anybatch.read_record(tmp_path / "r.jsonl").steps) == 3


@pytest.mark.parametrize("record", [3, ["r.jsonl", None], [["r.jsonl"]], {"path": 1}, object()])
def test_what_is_no_destination_is_refused_and_nothing_is_opened(tmp_path, monkeypatch, record):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(anybatch.InvalidValueError, match=r"anybatch\.sinks"):
        training(record)
    assert list(tmp_path.iterdir()) == []


def test_files_are_closed_again_where_a_later_one_cannot_be_opened(tmp_path):
    with pytest.raises(anybatch.InvalidValueError, match="Cannot write"):
        training([tmp_path / "r.jsonl", tmp_path])
    anybatch.RunRecord(tmp_path / "r.jsonl").close()


def test_rules_that_measure_nothing_leave_out_what_they_do_not_know():
    told = []
    _, take = training(told.append, scale=4, rule=anybatch.Linear())
    take()
    assert told[0].keys() >= {"anybatch/tau", "anybatch/lr"}
    assert told[0].keys().isdisjoint({"anybatch/gain", "anybatch/noise_scale"})


def test_tensorboard_itself_reads_the_steps_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    writer, told = SummaryWriter(tmp_path), []
    controller, take = training([sinks.tensorboard(writer), told.append])
    for _ in range(3):
        take()
    controller.log(accuracy=0.5)
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == {name for line in told for name in line} - {"anybatch/step"}
    for name in ("anybatch/gain", "anybatch/tau"):
        points = [(event.step, event.value) for event in events.Scalars(name)][:3]
        assert points == [(line["anybatch/step"], pytest.approx(line[name])) for line in told[:3]]
    assert [(event.step, event.value) for event in events.Scalars("anybatch/accuracy")] == [(3, 0.5)]


class Fake:
    """Records the calls of any method."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_wandb_is_told_everything_against_tau():
    run, told = Fake(), []
    _, take = training([sinks.wandb(run), told.append])
    take()
    assert run.calls == [("define_metric", ("anybatch/*",), {"step_metric": "anybatch/tau"}), ("log", (told[0],), {})]


def test_mlflow_is_told_every_step():
    module, told = Fake(), []
    _, take = training([sinks.mlflow(module), told.append])
    take()
    take()
    for (name, (values,), options), line in zip(module.calls, told, strict=True):
        assert (name, options) == ("log_metrics", {"step": line["anybatch/step"]})
        assert values == {key: value for key, value in line.items() if key != "anybatch/step"}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_examples_run(name, tmp_path, doctest_namespace):
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    tests = doctest.DocTestFinder(recurse=False).find(getattr(sinks, name), name, globs=dict(doctest_namespace))
    assert sum(len(test.examples) for test in tests) > 0
    assert all(doctest.DocTestRunner().run(test).failed == 0 for test in tests)
