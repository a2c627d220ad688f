"""The critical batch by experiment, against plain float64 loops; files that continue, and the command."""

import json
import math

import pytest
import torch
from torch import nn

import anybatch

DIM, BASE = 6, 4


def data(seed, size):
    """Batches of any size from one sequence of examples."""
    draws = torch.randn(40_000, DIM + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for x in draws.split(size):
        yield x[:, :DIM], x[:, :DIM].sum(1, keepdim=True) + x[:, DIM:]


def batches(size, seed):
    return data(seed, size)


def step(model, optimizer, controller, batch):
    for x, y in anybatch.split(batch, 2):
        ((model(x) - y).square().mean() / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def loss(model):
    return float((model.weight - 1).square().sum().detach())


def given(make=None, **arguments):
    torch.manual_seed(0)
    model = nn.Linear(DIM, 1, bias=False, dtype=torch.float64)
    make = make or (lambda p: torch.optim.SGD(p, lr=0.02))
    made = {"model": model, "optimizer": make(model.parameters()), "batches": batches, "loss": loss, "step": step}
    return {**made, "base_batch": BASE, "examples": 640, "factors": [2, 4, 8], "seeds": 2, **arguments}


def called(**arguments):
    arguments = given(**arguments)
    return anybatch.branch(arguments.pop("step"), **arguments)


def plain(weight, factor, seed, *, adam):
    """The loss after one branch by a loop of its own: SGD at lr * k, or Adam at lr * sqrt(k) with betas ** k."""
    w, m, v = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    stream = data(seed, factor * BASE)
    for t in range(1, 640 // (factor * BASE) + 1):
        x, y = next(stream)
        g = (2 * (x @ w.T - y) * x).mean(0, keepdim=True)
        if adam:
            b1, b2 = 0.9**factor, 0.99**factor
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            w = w - 0.02 * factor**0.5 * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + 1e-8)
        else:
            w = w - 0.02 * factor * g
    return float((w - 1).square().sum())


@pytest.mark.parametrize("adam", [False, True])
def test_each_branch_is_a_plain_loop_from_the_checkpoint(adam):
    make = (lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.99))) if adam else None
    arguments = given(make=make)
    weight = arguments["model"].weight.detach().clone()
    found = anybatch.branch(arguments.pop("step"), **arguments)
    assert [(each.factor, each.batch, each.steps) for each in found.batches] == [
        (1, 4, 160), (2, 8, 80), (4, 16, 40), (8, 32, 20),
    ]  # fmt: skip
    for each in found.batches:
        wanted = [plain(weight, each.factor, seed, adam=adam) for seed in range(2)]
        assert each.losses == pytest.approx(wanted, rel=1e-10)
        base = [plain(weight, 1, seed, adam=adam) for seed in range(2)]
        apart = [a - b for a, b in zip(wanted, base)]
        assert each.difference.value == pytest.approx(sum(apart) / 2, abs=1e-10)
        assert (each.difference.low, each.difference.high) == pytest.approx((min(apart), max(apart)), abs=1e-10)
    assert torch.equal(arguments["model"].weight, weight)
    assert not arguments["optimizer"].state


CURVES = {  # by factor the losses of two seeds; tolerance .1; critical factor, low and high by hand
    "between 2 and 4": ({1: [1, 2], 2: [1, 2], 4: [1.2, 2.2]}, (2 * 2**0.5, 2 * 2**0.5, 2 * 2**0.5)),
    "seeds differ": ({1: [1, 1], 2: [1.1, 1.2], 4: [2.1, 1.2]}, (2 ** (2 / 3), 2**0.5, 2)),
    "the first that leaves": ({1: [1, 1], 2: [1.4, 1.4], 4: [1, 1]}, (2**0.25, 2**0.25, 2**0.25)),
    "none leaves": ({1: [1, 1], 2: [1.05, 1], 4: [1, 1.09]}, (math.inf, math.inf, math.inf)),
    "one diverges": ({1: [1, 1], 2: [1, 1], 4: [math.inf, 1]}, (2, 2, math.inf)),
    "better at first": ({1: [1, 1], 2: [0.8, 0.8], 4: [1.2, 1.2]}, (2 * 2**0.75, 2 * 2**0.75, 2 * 2**0.75)),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_critical_batch_by_hand(name, tmp_path, monkeypatch):
    losses, (value, low, high) = CURVES[name]
    calls = iter([losses[k][seed] for seed in range(2) for k in sorted(losses)])
    found = called(factors=list(losses), loss=lambda _: next(calls), tolerance=0.1)
    wanted = [BASE * each for each in (value, low, high)]
    assert [found.critical.value, found.critical.low, found.critical.high] == pytest.approx(wanted)
    assert ("try larger ones" in str(found)) == math.isinf(value)
    factor = found.noise_factor
    assert factor.value == pytest.approx(found.critical.value / found.noise_scale.value)
    assert factor.low <= factor.value <= factor.high
    assert "<table>" in found._repr_html_()


def test_the_noise_scale_is_that_of_the_base_branch():
    """At the solution the squared mean is near 0; far from it, x * x.T has a known variance for one base batch."""
    arguments = given(make=lambda p: torch.optim.SGD(p, lr=1e-12), factors=[2], examples=8_000, seeds=1)
    error = arguments["model"].weight.detach() - 1
    found = anybatch.branch(arguments.pop("step"), **arguments)
    # gradient 2 x (x . e - n), x normal: mean 2 e; E ||g||^2 = 4 ((DIM + 2) e^2 + DIM) for one example.
    square = float(error.square().sum())
    variance = 4 * ((DIM + 2) * square + DIM) - 4 * square
    assert found.noise_scale.value == pytest.approx(variance / (4 * square), rel=0.15)


def test_one_backward_a_step_shows_no_noise():
    def whole(model, optimizer, controller, batch):
        (model(batch[0]) - batch[1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = called(step=whole)
    assert math.isnan(found.noise_scale.value)
    assert math.isnan(found.noise_factor.value)
    assert math.isfinite(found.batches[-1].losses[0])


def test_a_branch_that_diverges_is_beyond_the_critical_batch():
    found = called(make=lambda p: torch.optim.SGD(p, lr=0.2), factors=[64], examples=2560, seeds=1)
    assert found.batches[-1].losses[0] > 1e6
    assert found.critical.value < 64 * BASE

    def diverges(model, optimizer, controller, batch):
        step(model, optimizer, controller, batch)
        if len(batch[0]) == 8 * BASE:
            raise anybatch.DivergedError("The weights are not finite.")

    found = called(step=diverges)
    assert found.batches[-1].losses == (math.inf, math.inf)
    assert found.critical.value <= 4 * BASE


def test_a_file_continues_where_a_kill_left_it(tmp_path):
    path = tmp_path / "branch.jsonl"
    whole = called()
    trained = []

    def killed(model):
        trained.append(loss(model))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return trained[-1]

    with pytest.raises(KeyboardInterrupt):
        called(loss=killed, out=path)
    assert len(path.read_text().splitlines()) == 4  # the header and three branches
    path.write_bytes(path.read_bytes()[:-9])  # a kill in the midst of a line
    trained.clear()

    def counted(model):
        trained.append(loss(model))
        return trained[-1]

    again = called(loss=counted, out=path)
    assert len(trained) == 8 - 2
    assert again == whole
    assert called(loss=counted, out=path, factors=[2]).batches == whole.batches[:2]
    assert len(trained) == 6


def test_a_diverged_branch_is_kept_in_the_file(tmp_path):
    calls = iter([1, 1, math.nan, 1, 1, 1])
    found = called(factors=[2, 4], loss=lambda _: next(calls), out=tmp_path / "branch.jsonl")
    again = called(factors=[2, 4], loss=lambda _: 0.0, out=tmp_path / "branch.jsonl")
    assert found.batches == again.batches
    assert found.batches[2].losses == (math.inf, 1)


def short(size, seed):
    yield from (batch for batch, _ in zip(batches(size, seed), range(3)))


BAD = {
    "factors takes integers of at least 1, got 0": {"factors": [0]},
    "base_batch takes integers": {"base_batch": 2.5},
    "seeds takes integers": {"seeds": 0},
    "tolerance must be positive": {"tolerance": 0.0},
    "are 5 steps of the largest batch": {"examples": 160},
    r"returned 3 batches, and examples=640 need 160": {"batches": short},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_values(words):
    with pytest.raises(anybatch.InvalidValueError, match=words):
        called(**BAD[words])


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "branch.jsonl"
    called(out=path, factors=[2], seeds=1)
    with pytest.raises(anybatch.StateError, match="another checkpoint"):
        called(out=path, factors=[2], seeds=1, examples=1280)
    path.write_text(path.read_text().splitlines()[0] + '\n{"step": 1}\n')
    with pytest.raises(anybatch.StateError, match="not a file of branches"):
        called(out=path, factors=[2], seeds=1)


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import test_branch

def parts():
    return test_branch.given()

nothing = 3

def wrong():
    return [1]

def less():
    return {{"step": test_branch.step}}
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    typer = pytest.importorskip("typer")
    from pathlib import Path

    from typer.testing import CliRunner

    from anybatch import cli

    assert typer
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    return lambda *arguments: CliRunner().invoke(cli.app, ["branch", *arguments])


def test_the_command(command, tmp_path):
    pytest.importorskip("matplotlib")
    result = command("mine.py:parts", "--factors", "2,4", "--figure", "branch.png")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == str(called(factors=[2, 4])).splitlines()
    assert (tmp_path / "branch.png").read_bytes().startswith(b"\x89PNG")
    result = command("mine.py:parts", "--factors", "2,4", "--json")
    assert json.loads(result.output)["batches"][2]["batch"] == 16
    assert len((tmp_path / "branch.jsonl").read_text().splitlines()) == 1 + 3 * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mine.py"], "names no function"),
        (["other.py:parts"], "is no file"),
        (["mine.py:nothing"], "has no function"),
        (["mine.py:wrong"], "must return a dictionary"),
        (["mine.py:less"], "missing"),
        (["mine.py:parts", "--factors", "a"], "--factors takes integers"),
        (["mine.py:parts", "--examples", "40"], "--examples=40 are"),
        (["mine.py:parts", "--figure", "no/branch.png"], "--figure: cannot write"),
    ],
)
def test_bad_commands_are_one_clear_line(command, arguments, words):
    result = command(*arguments)
    assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1), result.output
    assert words in result.output
