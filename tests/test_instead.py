"""`benchmarks.instead`: its rows against plain loops and values by hand, its order, its statistics and its page."""

import json
from dataclasses import replace
from math import inf, sqrt
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks import instead, instead_page, instead_runs
from benchmarks.instead_page import blocks, filled, markdown
from benchmarks.instead_results import BEST, BEST_SHORT, Table, collect, from_json, tally, to_json
from benchmarks.instead_runs import ROWS, SHORT, Cache, Cell, Stage, runs_of, tuned, wanted
from benchmarks.instead_tasks import TASKS
from benchmarks.instead_train import Outcome, Run, train
from benchmarks.same_training import outwards

DOCS = Path(__file__).parent.parent / "docs"
LAST = 0.01


def short(monkeypatch, name, total):
    monkeypatch.setitem(TASKS, name, replace(TASKS[name], total=total))
    return TASKS[name]


# Trainings.


def test_mapped_values_with_a_warm_up_are_those_of_a_plain_loop(monkeypatch):
    task = short(monkeypatch, "digits-adamw", 40)
    run = Run("digits-adamw", 4, 3, 2e-3, steps=12, factor=0.5, kappa=4.0, warmup=0.25)
    net, order = task.model(3), torch.Generator().manual_seed(3)
    decay = (1 - (1 - 2e-3 * 0.1) ** 4) / (2e-3 * 2)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9**4, 0.99**4), eps=1e-8 / 2, weight_decay=decay)
    for i in range(12):
        rising = min(1.0, i / 3)
        optimizer.param_groups[0]["lr"] = (2e-3 + (2e-3 * 2 * 0.5 - 2e-3) * rising) * LAST ** (i / 12)
        x, y = task.batch(1, 4 * 16, order)
        optimizer.zero_grad()
        cross_entropy(net(x[0]), y[0]).backward()
        optimizer.step()
    found = train(run)
    assert found.losses[-1] == pytest.approx(task.held_out(net)[0], rel=1e-3)
    assert (found.steps, found.examples, len(found.losses)) == (12, 12 * 4 / 40, 20)


def test_momentum_on_the_clock_is_that_of_a_plain_loop_and_keeps_lr_over_one_minus_m(monkeypatch):
    task = short(monkeypatch, "digits-sgd", 40)
    net, order = task.model(0), torch.Generator().manual_seed(0)
    momentum, rate = 0.9**5, 5 * 0.02 * (1 - 0.9**5) / (1 - 0.9)
    buffers = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(8):
        x, y = task.batch(1, 5 * 8, order)
        gradients = torch.autograd.grad(cross_entropy(net(x[0]), y[0]), list(net.parameters()))
        with torch.no_grad():
            for p, buffer, g in zip(net.parameters(), buffers, gradients):
                buffer.mul_(momentum).add_(g)
                p.sub_(buffer, alpha=rate / 4 * LAST ** (i / 8))
    found = train(Run("digits-sgd", 5, 0, 0.02, steps=8, factor=0.25, kappa=5.0))
    assert found.losses[-1] == pytest.approx(task.held_out(net)[0], rel=1e-3)


def test_a_late_switch_has_the_base_batch_first(monkeypatch):
    sizes = []
    task = short(monkeypatch, "digits-adamw", 12)
    batch = lambda n, size, order: sizes.append(size) or task.batch(n, size, order)  # noqa: E731
    monkeypatch.setitem(TASKS, "digits-adamw", replace(task, batch=batch))
    found = train(Run("digits-adamw", 8, 0, 1e-3, steps=7, late=6))
    assert sizes == 6 * [16] + [8 * 16]
    assert found.examples == (6 + 8) / 12


def test_recording_at_scale_1_is_the_training_of_a_plain_loop_and_has_the_gains(monkeypatch):
    short(monkeypatch, "digits-adamw", 60)
    plain = train(Run("digits-adamw", 1, 0, 1e-3, steps=60))
    recorded = train(Run("digits-adamw", 1, 0, 1e-3, record=True))
    assert recorded.steps == 60
    assert recorded.losses == pytest.approx(plain.losses, rel=2e-3)
    assert list(recorded.gains) == ["8", "32", "128"]
    for scale, (gain, steps) in recorded.gains.items():
        assert 1 < gain < int(scale)
        assert 60 / gain <= steps < 60 / gain + 2


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_by_anybatch_and_by_fixed_values(monkeypatch, name):
    task = short(monkeypatch, name, 12)
    before, _ = task.held_out(task.model(0))
    ours = train(Run(name, 4, 0, task.lr))
    assert 3 <= ours.steps <= 12
    fixed = train(Run(name, 4, 0, task.lr, steps=ours.steps, kappa=1.5))
    for found in (ours, fixed):
        assert not found.diverged
        assert found.losses[-1] < before


def test_no_training_pixel_of_the_photographs_is_held_out():
    from benchmarks import instead_tasks as tasks

    columns = []
    original = tasks._patches
    try:
        tasks._patches = lambda p, row, column: columns.append(column) or original(p, row, column)
        tasks._noisy(4, 4000, torch.Generator().manual_seed(0))
        tasks._noisy_test.cache_clear()
        tasks._noisy_test()
    finally:
        tasks._patches = original
        tasks._noisy_test.cache_clear()
    assert 480 - 10 <= columns[0].max() + tasks.PATCH <= 480
    assert columns[1].min() >= 480


# Rows.


def known(path, name, lr, steps, *, scale, seeds=5):
    """A cache in which anybatch took `steps` at this scale."""
    cache = Cache(path / "runs.jsonl")
    for seed in range(seeds):
        cache.write(Run(name, scale, seed, lr), Outcome(steps + seed, 2.0, [1.0] * 20, 90.0, 1.0))
    gains = {str(s): [s / 2, 2 * TASKS[name].total / s] for s in (8, 32, 128)}
    cache.write(Run(name, 1, 0, lr, record=True), Outcome(1500, 1.0, [1.0] * 20, 90.0, 1.0, gains=gains))
    return cache


BY_HAND = {  # of digits-adamw (T = 1500) and digits-sgd (T = 3000) at S = 8, where anybatch took 250 steps
    "usual": ({"steps": 188, "factor": sqrt(8)}, {"steps": 375, "factor": 8.0, "warmup": 0.055}),
    "usual, stretched": ({"steps": 250, "factor": sqrt(8)}, {"steps": 250, "factor": 8.0, "warmup": 0.055}),
    "unscaled": ({"steps": 188}, {"steps": 375}),
    "unscaled, stretched": ({"steps": 250}, {"steps": 250}),
    "map at S": ({"steps": 188, "kappa": 8.0}, {"steps": 375, "factor": 8.0}),
    "map at S, stretched": ({"steps": 250, "kappa": 8.0}, {"steps": 250, "factor": 8.0}),
    "static values": ({"steps": 375, "kappa": 4.0}, {"steps": 750, "factor": 4.0}),
    "late switch": ({"steps": 844, "late": 750}, {"steps": 1688, "late": 1500}),
    "scale 1, as many examples": ({"scale": 1, "steps": 2000}, {"scale": 1, "steps": 3000}),
}


@pytest.mark.parametrize("row", BY_HAND)
@pytest.mark.parametrize("name", ["digits-adamw", "digits-sgd"])
def test_rows_have_the_values_by_hand(tmp_path, name, row):
    cache = known(tmp_path, name, 1e-3, 250, scale=8)
    runs, missing = runs_of(row, Cell(name, 8, 1e-3), 5, cache)
    assert (len(runs), missing) == (5, [])
    wanted = Run(name, **{"scale": 8, "seed": 0, "lr": 1e-3, **BY_HAND[row][name == "digits-sgd"]})
    assert replace(runs[0], factor=0, kappa=0) == replace(wanted, factor=0, kappa=0)
    assert (runs[0].factor, runs[0].kappa) == pytest.approx((wanted.factor, wanted.kappa), rel=1e-5)
    if "stretched" in row:
        assert [run.steps for run in runs] == [250, 251, 252, 253, 254]


@pytest.mark.parametrize(
    ("row", "start", "kappa", "warmup", "steps"),
    [
        ("re-tuned", sqrt(32), 1.0, 0.0, 100),
        ("re-tuned, clock", 1.0, 15.0, 0.0, 100),
        ("re-tuned, warm-up", sqrt(32), 1.0, 0.2, 100),
        ("re-tuned, clock, warm-up, T/S", 1.0, 1500 / 47, 0.2, 47),
    ],
)
@pytest.mark.parametrize("best", [-3, 0, 2])
def test_re_tuning_finds_the_best_power_of_two(tmp_path, row, start, kappa, warmup, steps, best):
    cache = known(tmp_path, "digits-adamw", 1e-3, 100, scale=32)
    cell, tried = Cell("digits-adamw", 32, 1e-3), set()
    while True:
        runs, missing = runs_of(row, cell, 5, cache)
        if not missing:
            break
        for run in missing:
            assert run.seed in (0, 1, 2)
            tried.add(run.factor)
            at = abs(torch.tensor(run.factor / start).log2().item() - best)
            cache.write(run, Outcome(run.steps, 1.0, [1.0, 1 + at + run.seed], 90.0, 1.0))
    assert [run.seed for run in runs] == [0, 1, 2, 3, 4]
    assert runs[0].factor == pytest.approx(start * 2.0**best, rel=1e-5)
    assert (runs[0].kappa, runs[0].warmup, runs[0].steps) == (pytest.approx(kappa, rel=1e-5), warmup, steps)
    wanted = range(min(-1, best - 1), max(1, best + 1) + 1)
    assert sorted(tried) == pytest.approx([start * 2.0**k for k in wanted], rel=1e-5)


@pytest.mark.parametrize("losses", [{k: float(-k) for k in range(-9, 10)}, dict.fromkeys(range(-9, 10), inf)])
def test_a_search_ends_where_no_best_lies_inside(losses):
    asked = []
    k, missing = outwards(lambda k: asked.append(k) or [k], losses.__getitem__, most=4)
    assert missing == []
    assert abs(k) == max(map(abs, asked)) == 4


# The order, the cache and the table.


STAGES = instead.of_tasks(("digits-sgd", "digits-adamw", "lstm", "denoiser-long"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The text of a cache after all stages, with made-up outcomes; re-tuned rates are best at the usual rule's."""
    cache, complete = Cache(tmp_path_factory.mktemp("whole") / "runs.jsonl"), set()
    while missing := list(wanted(STAGES, cache, complete)):
        for number, run in missing:
            assert 1 <= number <= len(STAGES)
            if run not in cache.found:  # a run of two stages is there twice
                cache.write(run, pretended(run))
    return cache.path.read_text()


@pytest.fixture
def whole(trained, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(trained)
    return Cache(path)


def pretended(run):
    task = TASKS[run.task]
    steps = run.steps or max(1, 3 * task.total // run.scale)
    away = abs(torch.tensor(run.lr / task.lr).log2().item())
    away += 0 if run.scale == 1 or run.kappa > 1 else abs(torch.tensor(run.factor / run.scale**task.exponent).log2())
    loss = round(1.0 + float(away) + 0.01 * (run.seed % 7) + (0.5 if run.steps and run.scale > 1 else 0), 4)
    gains = {str(s): [s / 2.00001234, 2 * task.total / s] for s in (8, 32, 128)} if run.record else {}
    return Outcome(steps, steps * run.scale / task.total, [loss] * 20, 50.0, 0.1, gains=gains)


def test_the_stages_train_every_row_and_a_killed_command_goes_on(whole):
    lines = collect(whole)
    found = {}
    for line in lines:
        assert line.seeds == (10 if line.scale == 1 else 5)
        found.setdefault((line.task, line.scale), []).append(line.row)
    assert {key: len(rows) for key, rows in found.items()} == {
        **{(name, 1): 1 for name in ("digits-sgd", "digits-adamw", "lstm", "denoiser-long")},
        **{(name, scale): 18 for name in ("digits-sgd", "digits-adamw") for scale in (8, 32)},
        ("lstm", 8): 14, ("lstm", 32): 14,  # no decay, so no row of the clock
        # Of the first rows and two of the map at S, which are the re-tuned ones at the usual rate.
        ("denoiser-long", 8): 11, ("denoiser-long", 32): 11,
        ("digits-sgd", 128): 10,  # 70 steps; the others keep less than 50
    }  # fmt: skip
    assert set(found["digits-sgd", 8]) == set(ROWS)
    text = whole.path.read_text()
    assert list(wanted(STAGES, Cache(whole.path), set())) == []
    whole.path.write_text(text[:-40])  # killed in the middle of a line
    again = Cache(whole.path)
    assert len(again.found) == len(whole.found) - 1
    ((_, lost),) = set(wanted(STAGES, again, set()))
    again.write(lost, whole.found[lost])
    assert Cache(whole.path).found == whole.found


def test_the_command_trains_nothing_twice(tmp_path, capsys, monkeypatch):
    stage = Stage(("factors",), (32,), ("anybatch",), 1)
    monkeypatch.setattr(instead_runs, "missing_of", lambda _, cache: [run for run in runs if run not in cache.found])
    runs = [Run("factors", 32, seed, 0.01, steps=4) for seed in range(3)]
    for expected in (3, 0):
        cache = Cache(tmp_path / "runs.jsonl")
        instead.work([stage], cache, 1)
        assert len(cache.found) == 3
        assert capsys.readouterr().out.count("4 steps") == expected
    assert cache.found[runs[0]].losses == train(runs[0]).losses


def test_statistics_of_made_up_outcomes(whole):
    lines = from_json(to_json(collect(whole)))
    table = Table(lines)
    ours, usual = table.of("digits-adamw", 8, "anybatch"), table.of("digits-adamw", 8, "usual")
    best = table.of("digits-adamw", 8, BEST)
    assert table.base["digits-adamw"].seeds == 10
    assert ours.loss == pytest.approx(1 + 1.5 + 0.02)  # its factor 1 is 1.5 doublings from the usual
    assert usual.loss == pytest.approx(1.52)
    assert (ours.mark, usual.mark, usual.against) == ("-", "-", "+")
    assert best.loss == pytest.approx(1.52)
    assert usual.examples == pytest.approx(188 * 8 / 1500, rel=1e-3)
    assert table.of("digits-adamw", 8, BEST_SHORT).steps == 188
    worse, same, better = tally(table, "usual", (8,), ["digits-adamw", "digits-sgd"])
    assert (worse, same, better) == (2, 0, 0)
    assert tally(table, "scale 1", (8, 32), SHORT) == (6, 0, 0)


def test_a_diverged_row_is_infinite_worse_and_null(whole):
    lr, _ = tuned("digits-sgd", whole)
    run = Run("digits-sgd", 8, 4, lr, steps=375, factor=8.0, warmup=0.055)
    assert run in whole.found
    whole.write(run, replace(whole.found[run], losses=[], diverged="the loss is not finite"))
    text = to_json(collect(whole))
    line = next(json.loads(x.rstrip(",")) for x in text.splitlines() if '"digits-sgd", "scale": 8, "row": "usual"' in x)
    assert (line["loss"], line["diverged"], line["mark"]) == (None, 1, "-")
    assert "| 5 (1 diverged) | 375 |" in markdown(from_json(text))


def test_the_figure_is_drawn(whole, tmp_path):
    instead_page.figure(collect(whole), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


# The committed results.


def test_results_tables_and_page_are_those_of_the_committed_trainings():
    text = (DOCS / "instead/results.json").read_text()
    assert to_json(collect(Cache(DOCS / "instead/runs.jsonl"))) == text
    lines = from_json(text)
    assert (DOCS / "instead/tables.md").read_text() == markdown(lines)
    page = (DOCS / "instead.md").read_text()
    for name in blocks(lines).keys() - {"instead"}:
        assert page.count(f"<!-- begin {name} -->") == page.count(f"<!-- end {name} -->") == 1
    assert filled(page, blocks(lines)) == page
    for front in (DOCS.parent / "README.md", DOCS / "index.md"):
        assert front.read_text().count("<!-- begin instead -->") == 1
        assert filled(front.read_text(), blocks(lines)) == front.read_text()
