"""recipes/train.py on the digits: the same run on any number of ranks, and after any interruption."""

import contextlib
import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from distributed import launch
from distributed import train_workers as workers
from torch import nn
from torch.utils.data import ConcatDataset

import anybatch
from anybatch._gradients.window_norms import WindowNorms
from recipes.digits import Digits
from recipes.train import main, run
from recipes.training.options import TASKS, Options, parse
from recipes.training.parallel import blocks, load
from recipes.training.task import DataError

TOTAL = 60
ELASTIC = Options(scale="4,8@0.3,2@0.7", total=TOTAL, seed=3, ema=0.9, evaluations=4, save_every=7)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


# ---- what follows from the options ----


@pytest.mark.parametrize(
    ("text", "scales"),
    [("8", [(8, 0)]), ("0.5", [(0.5, 0)]), ("32,64@0.25,128@0.5", [(32, 0), (64, 0.25), (128, 0.5)]), (16, [(16, 0)])],
)
def test_scales(text, scales):
    assert Options(scale=text).scales == scales


@pytest.mark.parametrize("text", ["", "x", "8,", "8@0.5", "8,4@0.5,2@0.5", "8,4@1", "0", "8,-1@0.5", "8@0@1"])
def test_scales_that_are_none(text):
    with pytest.raises(anybatch.InvalidValueError, match="--scale is like"):
        Options(scale=text)


def test_a_scale_holds_from_its_share_on():
    options = Options(scale="32,64@0.25,128@0.5")
    assert [options.scale_at(share) for share in (0, 0.2, 0.25, 0.49, 0.5, 0.99)] == [32, 32, 64, 64, 128, 128]


@pytest.mark.parametrize(
    ("scale", "micro_batch", "ranks", "expected"),
    [("8", None, 1, (8, 8)), ("8", None, 2, (8, 4)), ("8", 16, 2, (16, 2)), ("1", None, 2, (4, 1)),
     ("0.5", None, 1, (4, 1)), ("2", 2, 1, (2, 8)), ("8,2@0.5", None, 4, (4, 4))],
)  # fmt: skip
def test_the_accumulation_makes_the_scale(scale, micro_batch, ranks, expected):
    """scale = ranks * accumulation * micro_batch / base_batch, with a base batch of 8."""
    options, task = Options(scale=scale, micro_batch=micro_batch), Digits()
    size = options.micro_batch_for(task, ranks=ranks)
    accumulation = options.accumulation_for(options.scales[0][0], task, ranks=ranks)
    assert (size, accumulation) == expected
    assert ranks * accumulation * size / 8 == options.scales[0][0]


def test_a_micro_batch_is_the_nearest_whole_number():
    """0.29 * 100 is 28.999... in floating point."""
    assert Options(scale="0.29").micro_batch_for(SimpleNamespace(base_batch=100), ranks=1) == 29


@pytest.mark.parametrize("rule", ["adascale", "lsw", "lsw+", "linear", "sqrt", "identity"])
def test_every_rule_is_told_of_the_decays(rule):
    options = Options(rule=rule, decays="constant", steps=9 if rule == "lsw+" else None)
    assert options.rule_for_attach().decays == "constant"


def test_the_papers_own_algorithm_by_options():
    given, options = parse(
        ["digits", "--estimator", "paper", "--smoothing", "paper", "--decays", "0.5", "--out", "unused"]
    )
    assert options.rule_for_attach() == anybatch.AdaScale(estimator="paper", smoothing="paper", decays=0.5)
    assert given.decays == 0.5


def test_a_size_of_the_data_is_told_where_an_epoch_goes_once_through_it(tmp_path):
    """The digits' 1347 images are 168 base batches; the paper's estimator has no correction for that."""
    for estimator, examples in ((None, 1347), ("paper", None)):
        options = Options(scale="4", total=20, evaluations=1, estimator=estimator, out=tmp_path / str(estimator))
        run(Digits(), options)
        header = anybatch.read_record(tmp_path / str(estimator) / "record.jsonl").config
        assert header["examples"] == examples


@pytest.mark.parametrize(
    "values",
    [{"rule": "cubic"}, {"precision": "fp8"}, {"rule": "lsw+"}, {"steps": 9}, {"micro_batch": 0}, {"total": -1},
     {"evaluations": 0}],
)  # fmt: skip
def test_options_that_do_not_fit(values):
    with pytest.raises(anybatch.InvalidValueError, match="--"):
        Options(**values)


def test_fsdp2_gathers_the_outermost_blocks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(1, 1)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(1, 1), nn.ReLU()), nn.Linear(2, 2)])

    net = Net()
    assert list(blocks(net)) == [net.layers[0][0], net.layers[1]]


# ---- one process ----


@pytest.mark.parametrize("rule", ["adascale", "lsw", "linear", "sqrt", "identity"])
def test_every_rule_runs_to_the_end_of_the_clock(rule):
    summary = run(Digits(), Options(rule=rule, scale="8", total=TOTAL, evaluations=2))
    steps = summary["iterations"]
    assert summary["tau"] >= TOTAL - 1e-6
    if rule == "adascale":
        assert math.ceil(TOTAL / 8) <= steps < TOTAL
    else:
        assert steps == (TOTAL if rule == "identity" else math.ceil(TOTAL / 8))
    assert summary["examples"] == steps * 64
    assert summary["accuracy"] > 20


def test_lsw_plus_is_stretched_to_the_steps():
    assert run(Digits(), Options(rule="lsw+", steps=23, scale="8", total=TOTAL, evaluations=1))["iterations"] == 23


def test_the_scale_changes_at_its_share(tmp_path):
    run(Digits(), Options(scale="2,4@0.25,8@0.5", rule="linear", total=64, out=tmp_path))
    steps = anybatch.read_record(tmp_path / "record.jsonl").steps
    assert [step.scale for step in steps] == [2] * 8 + [4] * 4 + [8] * 4


def test_overrides_of_the_rate_and_the_schedule(tmp_path):
    run(Digits(), Options(rule="identity", lr=0.02, last_rate=0.25, total=10, out=tmp_path))
    steps = anybatch.read_record(tmp_path / "record.jsonl").steps
    assert [step.lr for step in steps] == pytest.approx([0.02 * 0.25 ** (t / 10) for t in range(10)])


def test_the_files_of_a_run(tmp_path):
    summary = run(Digits(), Options(scale="2", total=40, evaluations=5, ema=0.9, out=tmp_path))
    results = read(tmp_path / "results.jsonl")
    assert len(results) == 5
    assert all(40 * (i + 1) / 5 <= point["tau"] + 1e-6 < 40 * (i + 1) / 5 + 2 for i, point in enumerate(results))
    assert {"accuracy", "loss", "ema_accuracy", "ema_loss", "train_loss", "step"} <= set(results[0])
    assert {k: v for k, v in read(tmp_path / "summary.json")[0].items() if k in results[-1]} == results[-1]
    assert summary["iterations"] == len(anybatch.read_record(tmp_path / "record.jsonl").steps) == results[-1]["step"]


def test_the_training_loss_is_the_mean_since_the_last_evaluation(tmp_path):
    """Against the losses that the task gave."""

    class Noted(Digits):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            losses.append(loss.item())
            return loss

    losses = []
    run(Noted(), Options(rule="linear", scale="2", total=20, evaluations=2, out=tmp_path))
    means = [sum(part) / len(part) for part in (losses[:10], losses[10:])]
    assert [point["train_loss"] for point in read(tmp_path / "results.jsonl")] == pytest.approx(means)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains(precision, tmp_path):
    summary = run(Digits(), Options(precision=precision, scale="4", total=300, evaluations=1, out=tmp_path))
    assert summary["accuracy"] > 85
    assert summary["precision"] == precision
    scale = weights(tmp_path)["scaler"]
    assert (scale.get("scale", 0) > 0) == (precision == "fp16")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_an_evaluation_is_in_the_precision_of_the_training(precision):
    class Seen(Digits):
        def evaluate(self, *given):
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return super().evaluate(*given)

    seen = []
    run(Seen(), Options(precision=precision, total=4, evaluations=1, ema=0.9))
    assert seen == [torch.bfloat16 if precision == "bf16" else False] * 2


def test_a_compiled_model_trains_alike(monkeypatch):
    """As a whole: the digits' network is a Sequential, of which `nn.Module.compile` compiles nothing."""
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph

    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=backend))
    runs = [run(Digits(), Options(scale="4", total=20, evaluations=1, compile=c)) for c in (False, True)]
    assert graphs
    assert min(graphs) >= 5  # three layers and what is between them
    assert runs[0]["tau"] == pytest.approx(runs[1]["tau"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:10 steps in a row")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_without_a_finite_gradient_ends_once_and_says_so(precision, tmp_path):
    """Under fp16 the GradScaler skips the steps, and the controller does not hear of them."""
    options = Options(scale="8", lr=1e20, total=TOTAL, precision=precision, out=tmp_path)
    summary = run(Digits(), options)
    assert summary["diverged"]
    assert summary["skipped"] == 100
    assert read(tmp_path / "summary.json")[0]["train_loss"] is None  # strict JSON
    again = run(Digits(), options, watch=lambda *_: pytest.fail("trained again"))
    assert again["diverged"]
    assert (again["skipped"], again["examples"]) == (100, summary["examples"])


def test_an_average_without_memory_is_the_model():
    summary = run(Digits(), Options(total=8, evaluations=1, ema=0.0))
    assert (summary["ema_loss"], summary["ema_accuracy"]) == (summary["loss"], summary["accuracy"])


# ---- interruptions ----


@pytest.mark.parametrize(
    ("options", "stop"),
    [(ELASTIC, 2), (ELASTIC, 9), (ELASTIC, 16), (Options(scale="4", total=TOTAL, precision="fp16", save_every=5), 12)],
)
def test_a_resumed_run_is_bit_exact(options, stop, tmp_path):
    straight = workers.train(options, out=tmp_path / "straight")
    killed = workers.train(options, out=tmp_path / "killed", stop=stop)
    assert killed["summary"] is None
    assert len(straight["taus"]) > stop
    resumed = workers.train(options, out=tmp_path / "killed")
    mine, other = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    for part in ("model", "ema", "optimizer", "scheduler", "scaler", "controller", "used", "attempts", "losses"):
        assert_same(mine.get(part), other.get(part))
    assert resumed["taus"] == straight["taus"][-len(resumed["taus"]) :]
    assert (tmp_path / "killed/results.jsonl").read_text() == (tmp_path / "straight/results.jsonl").read_text()


def test_nothing_is_kept_of_a_run_that_was_killed_before_its_first_checkpoint(tmp_path):
    options = Options(total=TOTAL, evaluations=6, save_every=40)
    workers.train(options, out=tmp_path, stop=30)
    assert len(read(tmp_path / "results.jsonl")) == 3
    workers.train(options, out=tmp_path)
    assert [round(point["tau"]) for point in read(tmp_path / "results.jsonl")] == [10, 20, 30, 40, 50, 60]
    assert len(anybatch.read_record(tmp_path / "record.jsonl").steps) == TOTAL


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    options = Options(total=20, out=tmp_path, save_every=5)
    run(Digits(), options)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def torn(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    from recipes.training import parallel

    with pytest.raises(KeyboardInterrupt):
        parallel.save(tmp_path, {})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_finished_run_is_not_trained_again(tmp_path):
    options = Options(total=20, scale="2", out=tmp_path)
    first = run(Digits(), options)
    taus = []
    again = run(Digits(), options, watch=lambda tau, point: taus.append(tau))
    assert taus == []
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}
    assert again["seconds"] >= first["seconds"] * 0.9


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(Digits(), Options(total=20, out=tmp_path))
    with pytest.raises(DataError, match=r"rule='adascale', not 'linear'.*--out"):
        run(Digits(), Options(total=20, rule="linear", out=tmp_path))
    more = Digits()
    more.train_set = ConcatDataset([more.train_set, more.train_set])
    with pytest.raises(DataError, match="train_set=1347, not 2694"):
        run(more, Options(total=20, out=tmp_path))
    for content in (b"no", b""):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(DataError, match="is not a checkpoint"):
            load(tmp_path, same={})


# ---- several ranks ----


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """One rank's run; the same on two ranks; and one that changes from one rank to two, for DDP and for FSDP2."""
    folder = tmp_path_factory.mktemp("ranks")
    before = []
    with every_mean_is_read():
        one = workers.train(ELASTIC, out=folder / "one")
        for kind in ("DDP", "FSDP2"):
            workers.train(ELASTIC, out=folder / kind / "moved", stop=4)
            before.append(weights(folder / kind / "moved")["controller"]["steps"])
    assert 0 < before[0] == before[1] < len(one["taus"])
    return folder, one, before[0], launch.run(workers.ranks, world=2, args=(ELASTIC, str(folder)))


@contextlib.contextmanager
def every_mean_is_read():
    """On one process a window shorter than the one before is measured too, as it is over ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowNorms, "usual", property(lambda _: 0, lambda *_: None), raising=False)
        yield


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_ranks_are_one_rank_with_accumulation(kind, launched):
    """The same examples in the same steps."""
    folder, one, _, two = launched
    for rank in two:
        mine = rank[kind]
        assert mine["gains"] == pytest.approx(one["gains"], rel=1e-4)
        assert mine["taus"] == pytest.approx(one["taus"], rel=1e-4)
        for name, value in weights(folder / "one")["model"].items():
            torch.testing.assert_close(mine["weights"][name], value, rtol=1e-3, atol=1e-4)
    ours, theirs = read(folder / "one/results.jsonl"), read(folder / kind / "straight/results.jsonl")
    for a, b in zip(ours, theirs, strict=True):
        assert b == pytest.approx(a, rel=1e-3)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_a_run_goes_on_at_another_number_of_ranks(kind, launched):
    """One rank is killed; two take over, with the examples that come next; then one again."""
    folder, straight, before, two = launched
    out = folder / kind / "moved"
    assert two[0][kind]["moved"] == two[1][kind]["moved"]
    assert two[0][kind]["moved"] == pytest.approx(straight["taus"][before : before + 6], rel=1e-4)
    between = weights(out)["controller"]["steps"]
    assert before < between < len(straight["taus"])
    with every_mean_is_read():
        back = workers.train(ELASTIC, out=out)
    assert back["taus"] == pytest.approx(straight["taus"][between:], rel=1e-4)
    for name, value in weights(folder / "one")["ema"].items():
        torch.testing.assert_close(weights(out)["ema"][name], value, rtol=1e-3, atol=1e-4)


def test_an_accumulation_that_is_not_whole_is_said_before_training(launched):
    errors = [rank["unwhole"] for rank in launched[3]]
    assert errors[0] == errors[1]
    assert all(words in errors[0] for words in ("2 rank(s)", "1.5 times", "--micro-batch"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Every task by the command line on two ranks: exit codes and summaries."""
    folder = tmp_path_factory.mktemp("tasks")
    codes = launch.run(workers.tasks, world=2, args=(str(folder),))
    return codes, {path.parent.name: read(path)[0] for path in folder.glob("out/*/summary.json")}, folder


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_on_two_ranks(task, tasks):
    codes, summaries, _ = tasks
    assert [rank[task] for rank in codes] == [0, 0]
    found = summaries[task]
    assert (found["ranks"], found["skipped"], found["diverged"]) == (2, 0, False)
    assert 3 <= found["iterations"] <= 4  # batches of tokens are not full
    assert found["tau"] >= 6 - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_evaluate_as_one_process_does(task, tasks):
    """No example counts twice and none is left out; the ranks' own running averages of BatchNorm do not come in."""
    _, summaries, folder = tasks
    source, name = TASKS[task].split(":")
    alone = getattr(importlib.import_module(source), name)(folder / task, tiny=True)
    net = alone.model()
    net.load_state_dict(weights(folder / "out" / task)["model"])
    with torch.no_grad():
        expected = alone.evaluate(net.eval(), torch.device("cpu"))
    assert expected["loss"] > 0
    for key, value in expected.items():
        assert summaries[task][key] == pytest.approx(value, rel=1e-12), key


# ---- the command line ----


def test_data_is_not_made_for_a_task_that_has_its_own(tmp_path):
    with pytest.warns(anybatch.AnybatchWarning, match="digits has its data embedded"):
        assert main(["digits", "--make-data", "--total", "2", "--evaluations", "1", "--out", str(tmp_path)]) == 0


def test_the_command_line(tmp_path, capsys):
    arguments = ["digits", "--tiny", "--total", "30", "--scale", "4", "--out", str(tmp_path), "--evaluations", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("train_loss") == 3  # two evaluations and the summary
    assert json.loads(printed[printed.index("{") :])["iterations"] == read(tmp_path / "summary.json")[0]["iterations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10"], "--data"),
        (["cifar10", "--data", "/nowhere"], "/nowhere"),
        (["imagenet", "--data", "/nowhere"], "/nowhere/train"),
        (["cifar10", "--make-data"], "--make-data needs --data"),
        (["digits", "--scale", "x"], "--scale"),
        (["digits", "--scale", "1.3"], "--micro-batch"),
        (["digits", "--fsdp"], "torchrun"),
        (["digits", "--total", "0"], "--total"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_what_one_rank_finds_wrong_is_said_too(tmp_path, monkeypatch, capsys):
    """Another rank's disk may lack the file; what rank 0 alone would say is nothing."""
    monkeypatch.setenv("RANK", "3")
    assert main(["digits", "--scale", "x", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("rank 3: --scale is like")


def test_a_kill_while_data_is_made_leaves_none_of_it(tmp_path, monkeypatch):
    def killed(folder, **_):
        folder.mkdir()
        (folder / "data_batch_1.bin").write_bytes(bytes(3073))
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.images.cifar10.make", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["cifar10", "--tiny", "--data", str(tmp_path / "data"), "--make-data", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "data").exists()


def test_make_data_writes_once_and_trains(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    arguments = ["cifar10", "--tiny", "--data", str(data), "--make-data", "--total", "3", "--evaluations", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    written = {path: path.stat().st_mtime_ns for path in data.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}
    assert main([*arguments, "--seed", "1", "--out", str(out / "b")]) == 0
    assert {path: path.stat().st_mtime_ns for path in data.iterdir()} == written
    assert capsys.readouterr().out
