"""The statistics of `benchmarks.same_training` on curves worked out by hand, and that a stopped command goes on."""

import json
from dataclasses import replace
from math import inf, log, sqrt

import pytest

import anybatch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import same_training
from benchmarks.same_training_results import distance, mark, noise_floor
from benchmarks.same_training_tasks import CANDIDATES, TASKS


def flat(loss, *, first=0.0):
    return [{"tau": tau, "loss": loss, "metric": 0.0} for tau in (first, 100.0)]


def test_twice_the_loss_is_a_distance_of_log_two():
    assert distance([flat(2)], [flat(1)], total=100) == pytest.approx(log(2))


def test_the_distance_is_one_of_means():
    assert distance([flat(1), flat(3)], [flat(2)], total=100) == pytest.approx(0)


def test_a_curve_is_read_between_its_points_and_not_before_the_first():
    late = [{"tau": 50.0, "loss": 1.0}, {"tau": 100.0, "loss": 1.0}]
    early = [{"tau": 0.0, "loss": 9.0}, {"tau": 49.0, "loss": 9.0}, {"tau": 50.0, "loss": 1.0}, late[1]]
    assert distance([late], [early], total=100) == 0
    ramp = [{"tau": 0.0, "loss": 1.0}, {"tau": 100.0, "loss": 3.0}]
    bent = [{"tau": 0.0, "loss": 1.0}, {"tau": 37.0, "loss": 1.74}, {"tau": 100.0, "loss": 3.0}]
    assert distance([ramp], [bent], total=100) == pytest.approx(0, abs=1e-12)


def test_a_loss_that_is_not_finite_is_infinitely_far():
    assert distance([flat(inf)], [flat(1)], total=100) == inf


def test_the_noise_floor_is_over_all_halves():
    assert noise_floor([flat(1), flat(4)], total=100) == pytest.approx(log(4))
    # Of six ways, two have both ones on one side; in the other four the means are equal.
    assert noise_floor([flat(1), flat(1), flat(3), flat(3)], total=100) == pytest.approx(log(3) * sqrt(2 / 6))


@pytest.mark.parametrize(
    ("values", "higher", "expected"),
    [
        ([2.0, 2.1, 1.9], False, "-"),
        ([2.0, 2.1, 1.9], True, "+"),
        ([0.1, 0.2, 0.0], False, "+"),
        ([1.0, 1.3, 0.8], False, ""),
        ([0.1, 0.2, inf], False, "-"),
        ([0.1, 0.2, -inf], True, "-"),
    ],
)
def test_marks(values, higher, expected):
    assert mark(values, [1.0, 1.1, 0.9, 1.05], higher_is_better=higher) == expected


def test_values_without_a_spread_are_compared_as_they_are():
    assert mark([0.0, 0.0], [0.0, 0.0, 0.0]) == ""
    assert mark([1.0, 1.0], [0.0, 0.0, 0.0]) == "-"


def test_values_without_a_spread_on_one_side_have_variance_zero():
    assert mark([2.303] * 3, [0.09, 0.11, 0.1]) == "-"
    assert mark([0.1] * 3, [0.09, 0.11, 0.1]) == ""


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command on runs of 40 base iterations: `tiny("--table")`; its cache is in `tmp_path`."""
    monkeypatch.setitem(TASKS, "digits-sgd", replace(TASKS["digits-sgd"], lr=0.1, total=40, scales=(4,)))
    monkeypatch.setattr(same_training, "BASE_SEEDS", 2)
    monkeypatch.setattr(same_training, "TUNING_SEEDS", (100,))
    always = ["--only=digits-sgd", "--candidates=constant", "--seeds=2", "--jobs=1", f"--cache={tmp_path / 'cache'}"]
    return lambda *more: same_training.main([*always, *more])


def test_what_was_trained_is_not_trained_again(tiny, tmp_path, capsys):
    tiny(f"--json={tmp_path / 'first.json'}")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    lost = min(files)
    lost.unlink()
    capsys.readouterr()
    tiny(f"--json={tmp_path / 'second.json'}")
    assert capsys.readouterr().out.count("1/1 digits-sgd") == 1
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert again.keys() == files.keys()
    assert [path for path in files if files[path] != again[path]] == [lost]
    assert (tmp_path / "first.json").read_text() == (tmp_path / "second.json").read_text()


def test_a_table_is_of_the_cache_alone(tiny, tmp_path, capsys):
    tiny("--table")
    assert not (tmp_path / "cache").exists()
    tiny()
    capsys.readouterr()
    tiny("--table", f"--json={tmp_path / 'rows.json'}", f"--figure={tmp_path / 'drawing.png'}")
    out = capsys.readouterr().out
    assert "/1 digits-sgd" not in out
    assert "### digits-sgd" in out
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["scale"], row["candidate"], row["seeds"]) for row in found["rows"]] == [(1, "", 2), (4, "constant", 2)]
    assert [(score["candidate"], score["common"]) for score in found["scores"]] == [
        ("constant", True),
        ("constant", False),
    ]
    assert (tmp_path / "drawing.png").stat().st_size > 0


def test_a_candidate_that_the_library_refuses_is_said_before_any_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(CANDIDATES["momentum"], "constant", {"decays": "sometimes"})
    with pytest.raises(anybatch.InvalidValueError, match="sometimes"):
        tiny()
    assert not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore:10 steps in a row")
def test_a_run_without_finite_gradients_is_a_result(tmp_path):
    run = same_training.Run("digits-sgd", "constant", 1e6, 8, 0)
    result = same_training.train(run, same_training.Place(tmp_path, tmp_path, 1))
    assert result.diverged
    assert same_training.read(run, tmp_path).diverged == result.diverged
