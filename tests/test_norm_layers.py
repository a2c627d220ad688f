"""`benchmarks.norm_layers`: its noise scales against a plain loop, its ratios, and its table in docs/noise-scale.md."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from benchmarks import norm_layers
from benchmarks.instead_page import filled
from benchmarks.instead_tasks import TASKS

DOCS = Path(__file__).parent.parent / "docs"


def test_the_signal_of_a_first_step_is_that_of_a_plain_loop(monkeypatch):
    task = replace(TASKS["vit"], total=10)
    monkeypatch.setitem(TASKS, "vit", task)
    monkeypatch.setattr(norm_layers, "TENTHS", 1)
    monkeypatch.setattr(norm_layers, "LAST_RATE", 1.0)
    monkeypatch.setitem(norm_layers.RATES, "vit", 1e-12)  # so that every step has the gradients of the first weights
    found = norm_layers.train("vit", 3)
    net, order = task.model(3).double(), torch.Generator().manual_seed(3)
    names = [name for name, _ in net.named_parameters()]
    norms = [name for name in names if any(part in name for part in ("norm1", "norm2", "last"))]
    sums = {"whole": [0.0, 0.0], "norms": [0.0, 0.0]}
    for _ in range(40):  # more steps than the run has: `train` says how many by its own clock
        x, y = task.batch(8, task.base, order)
        parts = []
        for part, target in zip(x.double(), y):
            parts.append(dict(zip(names, torch.autograd.grad(task.loss(net(part), target), list(net.parameters())))))
        for key, chosen in (("whole", names), ("norms", norms)):
            mean = sum(float((sum(each[n] for each in parts) / 8).square().sum()) for n in chosen)
            single = sum(float(each[n].square().sum()) for each in parts for n in chosen) / 8
            sums[key][0] += (single - mean) / (1 - 1 / 8)
            sums[key][1] += mean - (single - mean) / (8 - 1)
        if abs(sums["whole"][1] / sums["whole"][0] / found["whole"][0] - 1) < 1e-3:
            break
    else:
        pytest.fail("no number of steps has this signal")
    assert found["norms"][0] == pytest.approx(sums["norms"][1] / sums["norms"][0], rel=1e-2)


def test_ratios_and_gains_of_made_up_signals(monkeypatch):
    monkeypatch.setattr(norm_layers, "TENTHS", 2)
    runs = [{"whole": [1.0, 0.5], "norms": [2.0, 4.0]}, {"whole": [1.0, 0.5], "norms": [2.0, 2.0]}]
    row = norm_layers.row(runs)
    assert row["ratio"] == pytest.approx([0.5, 0.5 / 3.0])
    # Calibrated by a half: 2 and 1 in place of 0.5 at the end.
    ratios = [(1 + n) / (1 / 32 + n) / (1.5 / (1 / 32 + 0.5)) for n in (2.0, 1.0)]
    assert row["gain at 32"] == pytest.approx([1.0, sum(ratios) / 2])
    assert row["sd at 32"][0] == 0


def test_the_pages_table_is_that_of_the_json():
    page = (DOCS / "noise-scale.md").read_text()
    found = json.loads((DOCS / "noise-scale/norm_layers.json").read_text())
    assert page.count("<!-- begin norm layers -->") == page.count("<!-- end norm layers -->") == 1
    assert filled(page, {"norm layers": norm_layers.table(found)}) == page
    gpt, vit = found["bytes-adamw"], found["vit"]
    assert (f"{gpt['ratio'][0]:.2f}", f"{gpt['ratio'][-1]:.2f}") == ("0.50", "0.15")
    assert [round(100 * (1 - gpt[f"gain at {s}"][-1])) for s in (8, 32, 128)] == [6, 21, 44]
    assert all(abs(each / vit["ratio"][0] - 1) < 0.25 for each in vit["ratio"])
    assert all(abs(each - 1) <= 0.09 for each in vit["gain at 32"])
