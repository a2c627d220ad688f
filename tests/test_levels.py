"""`benchmarks.levels`: the values inside of Adam's steps, and its tables."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import anybatch
from benchmarks import levels
from benchmarks.instead_levels import LEVELS, Level
from benchmarks.instead_page import filled
from benchmarks.instead_results import from_json, to_json
from benchmarks.instead_runs import Cache
from benchmarks.instead_tasks import TASKS
from benchmarks.instead_train import Outcome, Run, train

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    ("name", "of_gain"),
    {
        "": lambda r: (0.9**r, 0.99**r, 1e-8),
        "beta1 fixed": lambda r: (0.9, 0.99**r, 1e-8),
        "beta2 >= 0.9": lambda r: (0.9**r, max(0.99**r, 0.9), 1e-8),
        "beta1 fixed, beta2 >= 0.95": lambda r: (0.9, max(0.99**r, 0.95), 1e-8),
        "eps / sqrt(S)": lambda r: (0.9**r, 0.99**r, 1e-8 / 4),
    }.items(),
)
def test_the_values_in_a_step_are_those_of_the_level_and_the_base_comes_back(name, of_gain):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    level, seen = LEVELS[name], []
    controller = anybatch.attach(optimizer, model=model, rule=level.rule, total=500, base_batch=4, micro_batch=4)
    level.hook([optimizer], 16)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append((*o.param_groups[0]["betas"], o.param_groups[0]["eps"])))
    for _ in range(8):
        for _ in range(16):
            x = torch.randn(4, 3)
            ((model(x)[:, 0] - x.sum(1) - 40 * torch.randn(4)).square().mean() / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert seen[-1] == pytest.approx(of_gain(controller.gain))
        assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]) == ((0.9, 0.99), 1e-8)
    assert controller.gain > 11  # so that 0.99 ** gain is below both floors


def test_a_noise_factor_is_that_of_the_rule(monkeypatch):
    monkeypatch.setitem(TASKS, "digits-sgd", replace(TASKS["digits-sgd"], total=60))
    monkeypatch.setitem(LEVELS, "c = 1", Level(noise_factor=1.0))
    steps = [train(Run("digits-sgd", 16, 0, 0.02, level=name)).steps for name in ("", "c = 1", "c = 2", "c = 4")]
    assert steps[0] == steps[1] > steps[2] > steps[3]


def test_every_seed_of_every_cell_is_trained_and_collected(tmp_path):
    known, cache = Cache(DOCS / "instead/runs.jsonl"), Cache(tmp_path / "levels.jsonl")
    found = levels.rates(known)
    assert found[levels.EDGE] == ("digits-sgd", 2 * found["digits-sgd"][1])
    for run in dict.fromkeys(levels.wanted(known)):
        loss = 0.5 + 0.01 * (run.seed % 3) + 0.1 * (run.level == "c = 4")
        cache.write(run, Outcome(100, 8.0, [loss] * 20, 50.0, 0.1))
    lines = levels.collect(cache, known)
    for name in found:
        for scale in levels.SCALES[name]:
            rows = [line for line in lines if (line.task, line.scale) == (name, scale)]
            assert [line.row for line in rows] == list(levels.ROWS[name])
            assert {line.seeds for line in rows} == {levels.SEEDS}
    shown = levels.tables(from_json(to_json(lines)))
    assert f"| {levels.EDGE} | 32 | " in shown["sgd levels"]


def test_the_pages_tables_are_those_of_the_committed_trainings():
    text = (DOCS / "instead/levels.json").read_text()
    assert to_json(levels.collect(Cache(DOCS / "instead/levels.jsonl"), Cache(DOCS / "instead/runs.jsonl"))) == text
    page, found = (DOCS / "instead.md").read_text(), levels.tables(from_json(text))
    for name in found:
        assert page.count(f"<!-- begin {name} -->") == page.count(f"<!-- end {name} -->") == 1
    assert filled(page, found) == page
    assert {line["scale"] for line in json.loads(text)} == {1, 8, 32, 128}


# Of a level: cells, cells worse than scale 1, worse than the default, and per cent of fewer steps, as the page says.
SAID = {
    "c = 2": (13, 1, 1, 9),
    "c = 4": (13, 4, 4, 10),
    "beta1 fixed": (11, 6, 9, 22),
    "beta2 >= 0.9": (11, 0, 0, 2),
    "beta2 >= 0.95": (11, 0, 0, 6),
    "eps / sqrt(S)": (11, 0, 0, 1),
}


def test_what_the_page_says_of_the_levels_is_in_the_json():
    lines = from_json((DOCS / "instead/levels.json").read_text())
    default = {(line.task, line.scale): line for line in lines if not line.row}
    for name, said in SAID.items():
        found = [line for line in lines if line.row == name]
        fewer = geometric_mean(line.steps / default[line.task, line.scale].steps for line in found)
        worse, below = sum(line.mark == "-" for line in found), sum(line.against == "-" for line in found)
        assert (len(found), worse, below, round(100 * (1 - fewer))) == said, name
        assert not any(line.against == "+" for line in found)
    edge = {(line.scale, line.row): line.loss for line in lines if line.task == levels.EDGE}
    for scale in (8, 32, 128):
        assert edge[scale, ""] < edge[scale, "c = 2"] < edge[scale, "c = 4"]
