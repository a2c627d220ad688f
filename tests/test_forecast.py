"""Forecasts against a plain float64 loop that knows the true moments, and the laws that every forecast keeps."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anybatch
from anybatch._forecast import Estimate
from anybatch._record import Run
from anybatch._report.comparison import _bound

TOTAL = 1000.0


def falling(variance=4.0, sqnorm=8.0, late=0.02, pace=0.15):
    """Moments as training has them: the mean falls fast and far, the variance slowly."""
    return lambda x: (variance * math.exp(-x), sqnorm * (math.exp(-x / pace) + late))


def truth(moments, scale, *, total=TOTAL, horizon=0.01, theta=None):
    """AdaScale with the true moments: `(tau, iterations, variance, sqnorm)` of each step. A plain loop in float64."""
    tau, v, m, weight, moved = 0.0, 0.0, 0.0, 0.0, 1.0
    steps = []
    while tau < total - 1e-9:
        keep = min(math.exp(-moved / (horizon * total)), 1 - scale / 1000) if theta is None else theta
        now = moments(tau / total)
        v, m, weight = keep * v + (1 - keep) * now[0], keep * m + (1 - keep) * now[1], keep * weight + 1 - keep
        moved = (v + m) / (v / scale + m)
        moved = (
            moved ** (1 - math.sqrt(0.5) ** (len(steps) + 2)) if moved > 1 else moved
        )  # the first rest on few samples
        tau += moved
        steps.append((tau, moved, *now))
    return steps


def line(i, step, *, scale, seconds=0.5, **values):
    tau, iterations, v, m = step
    known = {
        "step": i + 1, "tau": tau, "iterations": iterations, "scale": float(scale), "count": max(2, int(scale)),
        "raw_variance": v, "raw_sqnorm": m, "variance": v, "sqnorm": m, "gain": iterations, "lr": 0.1,
        "lr_factor": iterations, "noise_scale": 1.0, "seconds": seconds, "skipped": False,
    }  # fmt: skip
    return anybatch.StepRecord(**{**known, **values})


def recorded(moments, scale, *, total=TOTAL, config=None, unit=1.0, seed=None, **values):
    """The record of such a run, with the noise of `scale` samples a step where a seed is given."""
    draw = random.Random(seed)
    lines = []
    for i, step in enumerate(truth(moments, scale, total=total)):
        v, m = step[2] * unit, step[3] * unit
        if seed is not None:  # the estimate of mu^2 from S samples is off by about sigma^2 / S
            m += draw.gauss(0, 0.3) * v / scale
            v *= 1 + draw.gauss(0, 0.3) / math.sqrt(scale)
        lines.append(line(i, (*step[:2], v, m), scale=scale, **values))
    return Run({"total": total, "base_batch": 8.0, **(config or {})}, lines, 0)


def value(found, scale):
    return next(s for s in found.scales if s.scale == scale).steps.value


@pytest.mark.parametrize("source", [1, 2, 8, 64])
@pytest.mark.parametrize("moments", [falling(), falling(late=0.3), falling(sqnorm=0.5), lambda x: (3.0, 1.0)])
def test_the_plain_loop_takes_as_many_steps(moments, source):
    found = anybatch.forecast(recorded(moments, source), [0.5, 2, 4, 16, 128])
    for s in found.scales:
        assert s.steps.value == pytest.approx(len(truth(moments, s.scale)), rel=0.03, abs=2)


def test_a_long_run_is_simulated_in_strides():
    run = recorded(falling(), 4, total=30_000.0)
    found = anybatch.forecast(run, [2, 8, 512])
    for s in found.scales:
        assert s.steps.value == pytest.approx(len(truth(falling(), s.scale, total=30_000.0)), rel=0.02, abs=2)


@pytest.mark.parametrize(("smoothing", "theta"), [(0.9, 0.9), ("paper", None), (0.0, 0.0)])
def test_the_rules_own_memory_is_simulated(smoothing, theta):
    run = recorded(falling(), 8, config={"estimator": "unbiased", "smoothing": smoothing})
    found = anybatch.forecast(run, [32])
    expected = truth(falling(), 32, theta=1 - 32 / 1000 if theta is None else theta)
    assert value(found, 32) == pytest.approx(len(expected), rel=0.03, abs=2)


def test_scale_one_takes_the_total_and_the_runs_own_scale_its_own_steps():
    run = recorded(falling(), 8, seed=0)
    at_one, at_own = anybatch.forecast(run, [1, 8]).scales
    assert at_one.steps == Estimate(1000, 1000, 1000)
    assert (at_one.efficiency.value, at_one.examples.value) == (1, 8000)
    assert at_own.steps.low <= len(run.steps) <= at_own.steps.high
    fractional = Run({"total": 99.5}, run.steps, 0)
    assert value(anybatch.forecast(fractional, [1]), 1) == 100


@pytest.mark.parametrize("source", [2, 8, 64])
def test_noisy_records_of_all_scales_agree_with_the_truth_within_their_bands(source):
    inside = []
    for seed in range(5):
        found = anybatch.forecast(recorded(falling(), source, seed=seed), [4, 16, 64])
        for s in found.scales:
            inside.append(s.steps.low <= len(truth(falling(), s.scale)) <= s.steps.high)
    assert sum(inside) >= 13  # of 15


@pytest.mark.parametrize("source", [32, 128])
def test_the_steps_with_a_large_chance_gain_do_not_weigh_more(source):
    """Where the averages are one step's, a chance error towards a small mean makes that step a long one."""
    draw, lines, tau = random.Random(0), [], 0.0
    while tau < TOTAL:
        m = max(0.0, 0.02 + draw.gauss(0, 0.015))
        gain = (1 + m) / (1 / source + m)
        tau += gain
        lines.append(line(len(lines), (tau, gain, 1.0, m), scale=source))
    found = anybatch.forecast(Run({"total": TOTAL}, lines, 0), [8])
    assert value(found, 8) == pytest.approx(len(truth(lambda x: (1.0, 0.02), 8)), rel=0.03)


@settings(max_examples=25, deadline=None)
@given(
    late=st.floats(0, 2),
    pace=st.floats(0.02, 1),
    sqnorm=st.floats(0.01, 100),
    source=st.sampled_from([1, 2, 8, 32]),
    seed=st.integers(0, 1000),
    scales=st.lists(st.floats(0.1, 300), min_size=2, max_size=5, unique=True),
)
def test_laws(late, pace, sqnorm, source, seed, scales):
    run = recorded(falling(sqnorm=sqnorm, late=late, pace=pace), source, total=150.0, seed=seed)
    found = anybatch.forecast(run, scales)
    assert [s.scale for s in found.scales] == sorted(scales)
    for s in found.scales:
        least, most = sorted((150 / s.scale, 150))
        n = s.steps
        assert math.ceil(least - 1e-6) <= n.low <= n.value <= n.high <= math.ceil(most)
        assert s.efficiency.low <= s.efficiency.value <= s.efficiency.high
        assert min(1, 1 / s.scale) - 1e-9 <= s.efficiency.value <= max(1, 1 / s.scale) + 1e-9
    for a, b in zip(found.scales, found.scales[1:]):
        assert a.steps.value >= b.steps.value
        assert a.examples.value <= b.examples.value * (1 + 1e-9)
    assert found.critical.low <= found.critical.value <= found.critical.high


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_the_unit_of_the_gradient_does_not_matter(unit):
    plain, other = (anybatch.forecast(recorded(falling(), 4, seed=1, unit=u), [2, 64]) for u in (1.0, unit))
    for a, b in zip(plain.scales, other.scales):
        for field in ("value", "low", "high"):
            assert getattr(a.steps, field) == getattr(b.steps, field)


def test_the_old_name_of_the_steps_warns():
    (found,) = anybatch.forecast(recorded(falling(), 4), [2]).scales
    with pytest.warns(DeprecationWarning, match=r"ScaleForecast\.steps"):
        assert found.iterations == found.steps


def test_a_forecast_is_the_same_every_time():
    run = recorded(falling(), 4, seed=1)
    state = torch.get_rng_state()
    one, other = (anybatch.forecast(run, scales, price_per_device_hour=1) for scales in ([1, 8], [8, 1, 8]))
    assert one == other
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_an_unfinished_run_goes_on_with_its_trend_and_a_wider_band(share):
    whole = recorded(falling(pace=0.4), 8, seed=2)
    part = Run(whole.config, [s for s in whole.steps if s.tau <= share * TOTAL], 0)
    full, cut = (anybatch.forecast(run, [4, 64]) for run in (whole, part))
    assert any(f"{share:.0%}" in note and "trend" in note for note in cut.notes)
    assert not any("trend" in note for note in full.notes)
    expected = len(truth(falling(pace=0.4), 64))
    n = cut.scales[1].steps
    assert n.low <= expected <= n.high
    assert n.value == pytest.approx(expected, rel=0.25 if share < 0.5 else 0.1)
    if share < 0.5:
        assert n.high - n.low > full.scales[1].steps.high - full.scales[1].steps.low


# Noise scales that grow: at a falling pace, with the variance, and ever faster.
GROWING = {
    "falling to a floor": falling(),
    "power law": lambda x: (4 * math.exp(-0.5 * x), 8 / (1 + x / 0.05) ** 2),
    "variance": lambda x: (1 + 3 * x, 0.2),
    "faster": lambda x: (4.0, 2 - 1.8 * x),
}


def test_the_critical_scale_of_an_unfinished_run_holds_that_of_the_whole():
    inside, wide = [], []
    for moments in GROWING.values():
        for source in (2, 8):
            whole = recorded(moments, source, seed=3, config={"ranks": source})  # one base batch for each device
            full = anybatch.forecast(whole, [64]).critical
            for share in (0.25, 0.5, 0.75):
                part = Run(whole.config, [s for s in whole.steps if s.tau <= share * TOTAL], 0)
                critical = anybatch.forecast(part, [64]).critical
                inside.append(critical.low <= full.value <= critical.high)
                wide.append(critical.high / critical.low)
    assert sum(inside) >= 22  # of 24
    assert sorted(wide)[12] < 2  # and not by saying nothing


def test_an_elastic_run_forecasts_as_one_of_a_single_scale():
    moments = falling()
    small, large = truth(moments, 4), truth(moments, 32)
    lines = [line(0, s, scale=4) for s in small if s[0] <= 250]
    start = lines[-1].tau
    lines += [line(0, (s[0], min(s[1], s[0] - start), *s[2:]), scale=32) for s in large if s[0] > start]
    run = Run({"total": TOTAL}, lines, 0)
    for s in anybatch.forecast(run, [8, 128]).scales:
        assert s.steps.value == pytest.approx(len(truth(moments, s.scale)), rel=0.03)


def test_without_a_total_the_record_is_the_run():
    run = recorded(falling(), 8)
    found = anybatch.forecast(Run({}, run.steps, 0), [1])
    assert value(found, 1) == math.ceil(run.steps[-1].tau)
    assert "no total" in found.notes[0]
    assert found.unit == "base batches"


def test_steps_skipped_or_lost_do_not_count():
    run = recorded(falling(), 8, seed=3)
    steps = run.steps
    more = list(steps)
    more.insert(30, line(0, (steps[29].tau, 0.0, math.nan, math.nan), scale=8, skipped=True))
    clean, skipping = (anybatch.forecast(Run(run.config, s, 0), [32], price_per_device_hour=1) for s in (steps, more))
    assert clean == skipping
    lost = [s for i, s in enumerate(steps) if not 40 <= i < 55]
    assert value(anybatch.forecast(Run(run.config, lost, 15), [32]), 32) == pytest.approx(value(clean, 32), rel=0.1)


@pytest.mark.parametrize(
    "config", [{}, {"total": "many"}, {"total": None, "rule": 3, "param_groups": "x", "ranks": -1}]
)
def test_a_header_may_hold_anything(config):
    run = Run(config, recorded(falling(), 4).steps, 0)
    expected = truth(falling(), 4, total=run.steps[-1].tau, theta=1 - 4 / 1000)  # no total: the paper's memory
    assert value(anybatch.forecast(run, [4]), 4) == pytest.approx(len(expected), rel=0.02)


@pytest.mark.parametrize(
    ("decays", "optimizer", "group", "noted"),
    [("clock", "SGD", {"momentum": 0.9}, False), ("constant", "SGD", {"momentum": 0.9}, True),
     ("auto", "SGD", {"momentum": 0.9}, True), (0.5, "SGD", {"momentum": 0.9}, True),
     (1.0, "SGD", {"momentum": 0.9}, False), ("auto", "SGD", {"momentum": 0}, False),
     ("auto", "Muon", {"momentum": 0.95}, False), ("constant", "Muon", {"momentum": 0.95}, True),
     ("auto", "Lion", {"betas": (0.9, 0.99)}, False), ("constant", "Lion", {"betas": (0.9, 0.99)}, True),
     (None, "SGD", {"momentum": 0.9}, False)],
)  # fmt: skip
def test_a_momentum_off_the_clock_is_noted(decays, optimizer, group, noted):
    config = {"decays": decays, "optimizer": optimizer, "param_groups": [{"lr": 0.1, **group}]}
    notes = anybatch.forecast(recorded(falling(), 4, total=200.0, config=config), [64]).notes
    assert any("not on the clock" in note for note in notes) == noted


def test_adam_is_noted():
    adam = recorded(falling(), 4, config={"decays": "clock", "optimizer": "SGD, AdamW"})
    assert "upper end" in anybatch.forecast(adam, [8]).notes[0]
    plain = recorded(falling(), 4, config={"decays": "constant", "param_groups": [{"momentum": 0}]})
    assert not anybatch.forecast(plain, [8]).notes


def test_a_run_without_variance_is_refused_with_what_to_do():
    run = recorded(falling(), 8, raw_variance=math.nan)
    with pytest.raises(anybatch.InvalidValueError, match=r"two or more gradients a step.*split"):
        anybatch.forecast(run, [4])
    with pytest.raises(anybatch.InvalidValueError, match="no step"):
        anybatch.forecast(Run({}, [], 0), [4])


@pytest.mark.parametrize(
    ("scales", "options", "word"),
    [([], {}, "scales"), ([0], {}, "scales"), ([-1], {}, "scales"), ([math.inf], {}, "scales"), (["8"], {}, "scales"),
     ([4], {"per_device": 0}, "per_device"), ([4], {"seconds_per_step": -1}, "seconds_per_step"),
     ([4], {"sync_seconds": math.nan}, "sync_seconds"), ([4], {"price_per_device_hour": -2}, "price_per_device_hour")],
)  # fmt: skip
def test_values_out_of_range_are_refused(scales, options, word):
    with pytest.raises(anybatch.InvalidValueError, match=word):
        anybatch.forecast(recorded(falling(), 4), scales, **options)


# ---- time and cost ----


def test_devices_grow_with_the_batch_and_time_follows_the_steps():
    run = recorded(falling(), 8, seconds=0.2)
    run.steps[5] = line(5, (run.steps[5].tau, run.steps[5].iterations, 4.0, 1.0), scale=8, seconds=500.0)  # a pause
    found = anybatch.forecast(run, [4, 8, 24, 64], sync_seconds=0.05, price_per_device_hour=3.0)
    assert [s.devices for s in found.scales] == [1, 1, 3, 8]
    assert (found.scales[0].step_seconds.low, found.scales[0].step_seconds.high) == pytest.approx((0.1, 0.2))
    for s, step in zip(found.scales, [math.sqrt(0.1 * 0.2), 0.2, 0.25, 0.25]):
        assert s.step_seconds.value == pytest.approx(step)
        assert s.seconds.value == pytest.approx(s.steps.value * step, rel=0.02)
        assert s.device_hours.value == pytest.approx(s.seconds.value * s.devices / 3600)
        assert s.cost.value == pytest.approx(3 * s.device_hours.value)
    given = anybatch.forecast(run, [8], per_device=1, seconds_per_step=7.0)
    assert given.scales[0].devices == 8
    assert given.scales[0].seconds.value == pytest.approx(7 * given.scales[0].steps.value, rel=0.02)
    assert math.isnan(given.scales[0].cost.value)


# Seconds of a step by base batches per device: nothing but overhead, nothing but work, and some of both.
STEP_SECONDS = {"constant": lambda x: 0.4, "proportional": lambda x: 0.05 * x, "both": lambda x: 0.1 + 0.0375 * x}


@pytest.mark.parametrize("name", STEP_SECONDS)
@pytest.mark.parametrize(
    ("scale", "per_device", "size"), [(1, None, 1), (4, None, 4), (8, 1, 1), (64, 16, 16), (20, None, 20 / 3)]
)
def test_a_step_of_a_size_not_timed_is_a_range_that_holds_it(name, scale, per_device, size):
    seconds, moments = STEP_SECONDS[name], falling()
    run = recorded(moments, 8, seconds=seconds(8))
    found = anybatch.forecast(run, [scale], per_device=per_device, sync_seconds=0.03, price_per_device_hour=3.0)
    s = found.scales[0]
    step = seconds(size) + (0.03 if s.devices > 1 else 0)
    real = len(truth(moments, scale)) * step
    assert s.step_seconds.low - 1e-9 <= step <= s.step_seconds.high + 1e-9
    assert s.seconds.low * 0.99 <= real <= s.seconds.high * 1.01
    assert s.cost.low * 0.99 <= real / 3600 * s.devices * 3 <= s.cost.high * 1.01
    assert s.step_seconds.low < s.step_seconds.value < s.step_seconds.high
    assert f"at scale {scale}:" in found.notes[-1]
    assert "second size" in found.notes[-1]


@pytest.mark.parametrize("name", STEP_SECONDS)
def test_with_two_sizes_timed_a_third_is_known(name):
    seconds, lines = STEP_SECONDS[name], []
    for i, step in enumerate(truth(falling(), 8)):
        lines.append(line(i, step, scale=(4, 16)[i % 2], seconds=seconds((4, 16)[i % 2])))
    found = anybatch.forecast(Run({"total": TOTAL}, lines, 0), [1, 8], per_device=16)
    for s in found.scales:
        assert s.step_seconds.low == s.step_seconds.high == pytest.approx(seconds(s.scale))
    assert not found.notes


def test_the_critical_scale_holds_both_ends_of_a_time_that_is_not_known():
    """With a synchronisation of 0.1 s it matters what a step of one base batch takes: from 0.05 to 0.4 s."""
    run = recorded(lambda x: (16.0, 1.0), 8, total=100_000.0, seconds=0.4)
    wide = anybatch.forecast(run, [8], per_device=1, sync_seconds=0.1).critical
    for seconds in (0.05, 0.4):
        known = anybatch.forecast(run, [8], per_device=1, seconds_per_step=seconds, sync_seconds=0.1).critical
        assert wide.low <= known.value <= wide.high
    assert wide.high > wide.low


def test_several_step_sizes_part_the_fixed_time_from_the_rest():
    lines = []
    for i, step in enumerate(truth(falling(), 8)):
        size = 4 if i % 2 else 8
        lines.append(line(i, step, scale=size, seconds=0.3 + 0.1 * size))
    found = anybatch.forecast(Run({"total": TOTAL}, lines, 0), [8, 80], per_device=8)
    assert found.scales[0].seconds.value == pytest.approx(1.1 * found.scales[0].steps.value, rel=0.01)
    two = Run({"total": TOTAL, "ranks": 2}, lines, 0)
    assert [s.devices for s in anybatch.forecast(two, [8, 80], per_device=8).scales] == [1, 10]
    assert "synchronisation" in anybatch.forecast(two, [8]).notes[-1]


def test_a_record_without_seconds_forecasts_the_rest():
    found = anybatch.forecast(recorded(falling(), 8, seconds=math.nan), [8])
    assert math.isnan(found.scales[0].seconds.value)
    assert "seconds_per_step" in found.notes[-1]
    assert found.critical.value > 1


@pytest.mark.parametrize(("variance", "sqnorm"), [(16.0, 1.0), (100.0, 2.0)])
def test_doubling_pays_up_to_the_noise_scale(variance, sqnorm):
    """With constant moments steps(S) = T * (1 + b/S) / (1 + b), so steps^2 * S is least at S = b, the noise scale."""
    run = recorded(lambda x: (variance, sqnorm), 4, total=100_000.0)  # long, so that its first steps do not count
    critical = anybatch.forecast(run, [4], per_device=1).critical
    assert critical.value == pytest.approx(variance / sqnorm, rel=0.1)
    assert anybatch.forecast(run, [4], per_device=128).critical.value == 128  # the first doubling does not pay
    slow = anybatch.forecast(run, [4], per_device=1, seconds_per_step=1.0, sync_seconds=9.0).critical
    assert slow.value in (pytest.approx(1), pytest.approx(critical.value, rel=0.1))


def test_pure_noise_pays_as_far_as_the_run_reaches_and_no_noise_never():
    noise = anybatch.forecast(recorded(lambda x: (1.0, 0.0), 4), [1, 100])
    assert value(noise, 100) == pytest.approx(len(truth(lambda x: (1.0, 0.0), 100)), abs=1)
    none = anybatch.forecast(recorded(lambda x: (0.0, 1.0), 4), [1, 100])
    assert value(none, 100) == 1000
    assert none.critical.value == pytest.approx(4)


@pytest.mark.parametrize("extreme", [1e-308, 1e-13, 1e13, 1e308, 5e-324])
def test_a_scale_out_of_reach_is_a_typed_error(extreme):
    run = recorded(falling(), 4)
    with pytest.raises(anybatch.InvalidValueError, match="scales must be between"):
        anybatch.forecast(run, [extreme])
    with pytest.raises(anybatch.InvalidValueError, match="per_device must be between"):
        anybatch.forecast(run, [1], per_device=extreme)
    for edge in (1e-12, 1e12):
        assert math.isfinite(anybatch.forecast(run, [edge], per_device=edge).scales[0].steps.value)


def test_a_run_on_several_numbers_of_ranks_is_noted():
    run = recorded(falling(), 4)
    notes = anybatch.forecast(Run(run.config, run.steps, 0, ranks=(2, 4)), [8]).notes
    assert "another number of ranks (2, 4)" in notes[0]
    assert not anybatch.forecast(Run(run.config, run.steps, 0, ranks=(2,)), [8]).notes


def test_a_rule_that_measures_nothing_is_said_so(tmp_path):
    """The header has the names of AdaScale's settings, without values, for every rule."""
    run = recorded(falling(), 4)
    config = {**run.config, "rule": "Linear()", "estimator": None, "smoothing": None}
    assert "did not use AdaScale" in anybatch.forecast(Run(config, run.steps, 0), [8]).notes[0]


def test_runs_of_one_configuration_may_differ_in_the_batch_alone():
    small, large, other = (
        _bound({"rule": "AdaScale()", "scale": scale, "given": {"scale": scale, "rule": rule}})
        for scale, rule in ((2, "ada"), (8, "ada"), (8, "mine"))
    )
    assert small == large != other
    assert _bound({"given": 3, "ranks": 2}) == {"given": 3}


def test_fifty_kills_change_no_forecast(tmp_path):
    """A record as fifty kills leave it: torn last lines, steps lost or taken again since the last checkpoint."""
    run, draw = recorded(falling(), 4, seed=3), random.Random(0)
    stops = sorted(draw.sample(range(5, len(run.steps)), 50))
    path, at, lost = tmp_path / "run.jsonl", 0, 0
    for stop in [*stops, len(run.steps)]:
        record = anybatch.RunRecord(path, config=run.config)
        for step in run.steps[at:stop]:
            record.write(step)
        record.close()
        whole = path.read_bytes()
        if stop < len(run.steps) and at < stop:  # the kill tears the last line
            path.write_bytes(whole[: -draw.randrange(2, 100)])
            lost += 1
        at = max(0, stop - draw.choice([1, 1, 4]))
    killed = anybatch.read_record(path)
    assert killed.torn == lost >= 45
    assert [s.step for s in killed.steps] == [s.step for s in run.steps]
    scales = [1, 2, 16, 64]
    for mine, undisturbed in zip(anybatch.forecast(path, scales).scales, anybatch.forecast(run, scales).scales):
        n = undisturbed.steps
        assert n.low <= mine.steps.value <= n.high
        assert mine.steps.value == pytest.approx(n.value, rel=1e-3)
