"""The band of a forecast is what the committed cases come to, and holds on tasks left out as often as the page says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from test_forecast import falling, recorded

import anybatch
from anybatch._forecast.steps import DOWN, UP
from benchmarks import forecast_band as band

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def rows():
    return json.loads((DOCS / "forecast/band.json").read_text())["rows"] + band.earlier(DOCS / "forecast/tasks.json")


def needed(rows, sign):
    """A plain loop: the smallest number that at least 95 % of the weight of the cases does not exceed."""
    tasks = {row["task"] for row in rows}
    found = []
    for row in rows:
        same = sum(other["task"] == row["task"] for other in rows)
        doublings = math.log2(row["scale"]) - math.log2(row["recorded"])
        log_error = math.log(row["real"]) - math.log(row["forecast"])
        found.append((sign * log_error / (1 + doublings), 1 / same / len(tasks)))
    candidates = sorted(value for value, _ in found)
    return next(c for c in candidates if sum(weight for value, weight in found if value <= c) >= 0.95 - 1e-9)


def test_the_library_has_the_numbers_of_the_committed_cases(rows):
    assert len(rows) == 128
    assert (round(needed(rows, -1), 3), round(needed(rows, 1), 3)) == (DOWN, UP)
    assert band.bounds(rows) == pytest.approx((needed(rows, -1), needed(rows, 1)))


def test_coverage_on_tasks_left_out_is_what_the_page_says(rows):
    held = {}
    for name in {row["task"] for row in rows}:
        others = [row for row in rows if row["task"] != name]
        down, up = needed(others, -1), needed(others, 1)
        held[name] = []
        for row in (row for row in rows if row["task"] == name):
            factor = (row["real"] / row["forecast"]) ** (1 / (1 + math.log2(row["scale"] / row["recorded"])))
            held[name].append(math.exp(-down) - 1e-12 <= factor <= math.exp(up) + 1e-12)
    assert held == band.left_out(rows, str)
    cases = sum(map(sum, held.values()))
    share = sum(sum(each) / len(each) for each in held.values()) / len(held)
    text = (DOCS / "forecast.md").read_text()
    assert f"in {cases} of {len(rows)} cases, {share:.0%} in the mean over the {len(held)} tasks" in " ".join(
        text.split()
    )


@pytest.mark.parametrize("scale", [16, 64, 4])
def test_a_band_reaches_at_least_as_far_as_the_measured_errors(scale):
    found = anybatch.forecast(recorded(falling(), 8), [scale, 8])
    n = next(s.steps for s in found.scales if s.scale == scale)
    total, doublings = found.total, abs(math.log2(scale / 8))
    down, up = (DOWN, UP) if scale > 8 else (UP, DOWN)
    assert n.low <= max(math.ceil(n.value * math.exp(-down * (1 + doublings))), math.ceil(total / scale))
    assert n.high >= min(math.floor(n.value * math.exp(up * (1 + doublings))), total)
    assert n.low <= n.value <= n.high


def test_cases_are_told_with_their_coverage(capsys):
    band.main(["--json", str(DOCS / "forecast/band.json"), "--earlier", str(DOCS / "forecast/tasks.json")])
    out = capsys.readouterr().out
    assert "18 tasks, 128 cases: down 0.034, up 0.141" in out
    for line in out.splitlines():  # the page's two tables are these
        if line.startswith("| ") and line[2].isalnum() and "cases" not in line:
            assert line in (DOCS / "forecast.md").read_text()


@pytest.mark.slow
def test_a_case_is_a_record_and_the_steps_of_larger_scales(tmp_path, monkeypatch):
    results = DOCS / "same-training/results.json"
    monkeypatch.setitem(band.TASKS, "digits-sgd", replace(band.TASKS["digits-sgd"], total=120))
    rows = band.rows_of("digits-sgd", results=results, data=tmp_path)
    assert [(row["recorded"], row["scale"]) for row in rows] == [
        (1, 8), (1, 32), (1, 128), (2, 8), (2, 32), (2, 128), (8, 32), (8, 128)]  # fmt: skip
    assert {row["scale"]: row["real"] for row in rows} == {8: 455.2, 32: 169.8, 128: 94.4}
    assert all(120 / row["scale"] <= row["forecast"] <= 120 for row in rows)
