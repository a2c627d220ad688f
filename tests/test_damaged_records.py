"""Damaged records: a forecast, a page or an error of ours, soon and in little memory, whatever a record says.

The damage is drawn from a seed.
"""

import json
import math
import random
import resource
import time

import pytest
from test_forecast import falling, line, recorded, truth

import anybatch
from anybatch._forecast import Forecast
from anybatch._record import Run
from anybatch._report.comparison import compare
from anybatch._report.report import report
from anybatch._report.summary import summarise

VALUES = [
    None, True, False, "3", "", "many", [], [1], {}, {"a": 1}, 0, -1, 1, 0.5, 1e-300, -1e-300, 5e-324, 1e12, 1e16,
    1e100, 1e300, -1e300, 1.7e308, 10**15, 10**20, 10**400, -(10**400), math.inf, -math.inf, math.nan,
]  # fmt: skip
SECONDS, MEGABYTES = 20.0, 400.0  # for one record: a generous bound, where 64 GB and hours were


def lines_of(scale, *, total, seed):
    run = recorded(falling(), scale, total=total, seed=seed)
    config = {
        **run.config, "rule": "AdaScale()", "estimator": "unbiased", "smoothing": None, "decays": "auto",
        "param_groups": [{"lr": 0.1, "momentum": 0.9}], "ranks": 1, "noise_factor": 1.0, "parameters": 10, "task": "x",
    }  # fmt: skip
    header = {"kind": "header", "version": 2, "config": config, "seed": 0}
    layers = {"first": [2.0, 1.0], "second": [3.0, 0.1]}
    steps = [{"kind": "step", **vars(step), "per_layer": layers if step.step % 3 else {}} for step in run.steps]
    steps.insert(5, {"kind": "metric", "step": 5, "tau": 8.0, "values": {"accuracy": 0.5, "loss": 1.0}})
    return [header, *steps]


def damaged(lines, draw):
    """The bytes of a record with one to three damages."""
    lines = json.loads(json.dumps(lines))
    for _ in range(draw.choice([1, 1, 2, 3])):
        kind = draw.choice(["field"] * 6 + ["header"] * 4 + ["column", "scaled", "swapped", "twice", "lost", "deep"])
        step = draw.choice(lines[1:])
        name = draw.choice(list(step))
        if kind == "field":
            step[name] = draw.choice(VALUES)
        elif kind == "header":
            place = draw.choice([lines[0], lines[0]["config"], lines[0]["config"]])
            if isinstance(place, dict):
                place[draw.choice(list(place))] = draw.choice(VALUES)
        elif kind == "column":
            value = draw.choice(VALUES)
            for each in lines[1:]:
                if name in each:
                    each[name] = value
        elif kind == "scaled":
            factor = draw.choice([-1, 0, 1e-9, 1e-200, 1e9, 1e200])
            for each in lines[1:]:
                if isinstance(each.get(name), int | float):
                    each[name] = each[name] * factor
        elif kind == "swapped":
            i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == "twice":
            lines[len(lines) // 2 : len(lines) // 2] = draw.choices(lines, k=3)
        elif kind == "lost":
            del lines[draw.randrange(len(lines))]
        elif kind == "deep":
            nested = []
            for _ in range(draw.choice([50, 900])):
                nested = [nested]
            lines[draw.choice([0, 3])]["config"] = {"rule": nested, "task": nested, "total": nested}
        if not isinstance(lines[0].get("config"), dict):
            break
    data = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
    if draw.random() < 0.2:
        at = draw.randrange(len(data))
        cut = [data[:at], data[:at] + bytes(draw.randrange(256) for _ in range(40)) + data[at:], data[at:]]
        data = draw.choice(cut)
    return data


def bounded(function, *args):
    """The result, or an error of ours, within bounds of time and memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        return function(*args)
    except anybatch.AnybatchError as error:
        return error
    finally:
        assert time.monotonic() - start < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


def test_a_damaged_record_is_forecast_or_refused(tmp_path):
    draw, refused, path = random.Random(0), 0, tmp_path / "damaged.jsonl"
    sources = [lines_of(scale, total=20.0, seed=scale) for scale in (2, 8)]
    for _ in range(300):
        path.write_bytes(damaged(draw.choice(sources), draw))
        run = bounded(anybatch.read_record, path)
        bounded(list, anybatch.iter_record(path)) if isinstance(run, Run) else None
        found = bounded(anybatch.forecast, path, [1, 4, 32])
        if isinstance(found, Exception):
            refused += 1
            assert path.name in str(found)
            assert "\n" not in str(found)
            continue
        for s in found.scales:
            assert 0 < s.steps.low <= s.steps.value <= s.steps.high < math.inf
            least, most = sorted((found.total / s.scale, found.total))
            assert math.ceil(least - 1e-6) <= s.steps.value <= math.ceil(most)
        assert found.critical.value > 0
    assert 80 < refused < 260


def test_a_page_about_damaged_records(tmp_path):
    draw, paths = random.Random(1), []
    for i in range(40):
        paths.append(tmp_path / f"{i}.jsonl")
        paths[-1].write_bytes(damaged(lines_of(2 if i % 2 else 8, total=20.0, seed=0), draw))
    told = []
    text = bounded(lambda: report(paths, warn=told.append))
    runs = summarise(paths, unread=lambda _: None)
    assert len(told) + len(runs) == 40
    assert 0 < len(told) < 20
    for run in runs:
        assert f">{run.name}</td>" in text
    compare(runs)


# ---- one damage each, with its words ----


def changed(at, **values):
    run = recorded(falling(), 4, total=100.0)
    run.steps[at] = anybatch.StepRecord(**{**vars(run.steps[at]), **values})
    return run


@pytest.mark.parametrize(
    ("field", "value"),
    [("tau", 1e300), ("tau", -3.0), ("tau", math.nan), ("tau", "3"), ("tau", 0.5), ("iterations", -1.0),
     ("iterations", 1e9), ("iterations", math.inf), ("scale", 0.0), ("scale", math.nan), ("scale", 1e300),
     ("scale", None), ("raw_variance", 1e200), ("raw_sqnorm", math.inf), ("seconds", 1e300), ("seconds", -1.0)],
)  # fmt: skip
def test_an_impossible_step_is_named(tmp_path, field, value):
    run = changed(20, **{field: value})
    with pytest.raises(anybatch.InvalidValueError, match=rf"The record, in the line of step 2[12]: .*{field}.*delete"):
        anybatch.forecast(run, [8])


def test_the_file_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines_of(4, total=60.0, seed=0)))
    assert anybatch.forecast(path, [8]).notes == ()
    lines = path.read_text().splitlines()
    swapped = [*lines[:9], lines[12], *lines[10:12], lines[9], *lines[13:]]
    path.write_text("\n".join(swapped) + "\n")
    with pytest.raises(
        anybatch.InvalidValueError, match=r"mine\.jsonl'.*step \d+.*tau = .* less than in the step before"
    ):
        anybatch.forecast(path, [8])


@pytest.mark.parametrize("name", ["total", "ranks", "base_batch", "noise_factor"])
@pytest.mark.parametrize("value", [1e300, 1e-300])
def test_an_impossible_header_is_named(name, value):
    run = recorded(falling(), 4, total=100.0, config={name: value})
    with pytest.raises(anybatch.InvalidValueError, match=f"in its header: {name} = "):
        anybatch.forecast(run, [8])


@pytest.mark.parametrize("total", [1e-9, 0.1, 20.0])
def test_a_total_that_the_run_went_beyond_is_noted(total):
    run = recorded(falling(), 4, total=100.0, config={"total": total})
    found = anybatch.forecast(run, [0.5, 8])
    assert found.total == total
    assert any("beyond the total" in note for note in found.notes)
    assert found.scales[1].steps.value <= math.ceil(total)


@pytest.mark.parametrize("name", ["per_device", "seconds_per_step", "sync_seconds", "price_per_device_hour"])
@pytest.mark.parametrize("value", [1e300, -1, "3", True, math.nan, pytest.param(10**400, id="huge"), [1]])
def test_arguments_out_of_reach(name, value):
    with pytest.raises(anybatch.InvalidValueError, match=name):
        anybatch.forecast(recorded(falling(), 4, total=100.0), [8], **{name: value})


@pytest.mark.parametrize("value", ["3", True, None, pytest.param(10**400, id="huge"), [1]])
def test_scales_that_are_none(value):
    with pytest.raises(anybatch.InvalidValueError, match="scales"):
        anybatch.forecast(recorded(falling(), 4, total=100.0), [8, value])


@pytest.mark.parametrize(
    "config",
    [{"total": None}, {"smoothing": "paper"}, {"estimator": "paper", "total": None}, {"smoothing": 1 - 1e-16},
     {"estimator": "paper", "smoothing": 0.9999999}],
)  # fmt: skip
def test_a_tiny_scale_and_a_long_memory_take_no_longer(config):
    run = recorded(falling(), 4, total=100.0, config=config)
    found = bounded(anybatch.forecast, run, [1e-12, 1e-3, 0.5])
    for s in found.scales:
        assert found.total - 1e-6 <= s.steps.value <= math.ceil(found.total / s.scale)


@pytest.mark.parametrize("scale", [0.05, 0.2])
def test_steps_put_together_while_the_averages_fill_are_the_plain_loops(scale):
    """The paper's memory of 1000 / S steps is all of this run."""
    run = recorded(falling(), 4, config={"smoothing": "paper"})
    expected = len(truth(falling(), scale, theta=1 - scale / 1000))
    found = anybatch.forecast(run, [scale]).scales[0].steps
    assert expected > 2000
    assert found.value == pytest.approx(expected, rel=0.01)


def test_steps_that_differ_beyond_all_digits_are_refused():
    lines, tau = [], 0.0
    for i in range(40):
        moved = 1e-9 if i > 10 else 1e13
        tau += moved
        lines.append(line(i, (tau, moved, 1e99, 1.0), scale=4))
    found = bounded(anybatch.forecast, Run({"total": 1e15}, lines, 0), [8])
    assert isinstance(found, Forecast | anybatch.InvalidValueError)
