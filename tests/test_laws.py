"""The laws of the gain, as properties, and the cases that can be worked out by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import anybatch
from anybatch._controller.gain_estimator import GainEstimator, RunningMoments
from anybatch._gradients import ReducedWindow
from anybatch._gradients.window import Shares
from anybatch._scaling import Moments
from anybatch._scaling.batch import BatchSize
from anybatch._scaling.moments import Averages

moment = st.floats(0, 1e12, allow_subnormal=False)
positive = st.floats(1e-12, 1e12)
scale = st.floats(1e-3, 1e4)


@given(variance=moment, sqnorm=moment, scale=scale)
def test_gain_lies_between_one_and_the_scale(variance, sqnorm, scale):
    assert min(1, scale) <= anybatch.gain(variance, sqnorm, scale) <= max(1, scale)


@given(variance=moment, sqnorm=moment)
def test_at_scale_one_the_gain_is_exactly_one(variance, sqnorm):
    assert anybatch.gain(variance, sqnorm, 1) == 1


@given(sqnorm=moment, scale=scale)
def test_without_variance_the_gain_is_one(sqnorm, scale):
    assert anybatch.gain(0.0, sqnorm, scale) == 1


@given(variance=positive, scale=scale)
def test_without_mean_the_gain_is_the_scale(variance, scale):
    assert anybatch.gain(variance, 0.0, scale) == scale


@given(variance=positive, sqnorm=positive, scales=st.tuples(scale, scale))
def test_gain_grows_with_the_scale(variance, sqnorm, scales):
    low, high = sorted(scales)
    assert anybatch.gain(variance, sqnorm, low) <= anybatch.gain(variance, sqnorm, high) * (1 + 1e-12)


@given(variance=positive, sqnorm=positive, scales=st.tuples(scale, scale))
def test_efficiency_falls_with_the_scale(variance, sqnorm, scales):
    """r/S, Pollux's statistical efficiency: a larger batch never makes an example worth more."""
    low, high = sorted(scales)
    efficiency = [anybatch.gain(variance, sqnorm, s) / s for s in (low, high)]
    assert efficiency[1] <= efficiency[0] * (1 + 1e-12)


@given(variance=positive, sqnorm=positive, scale=scale, unit=st.floats(1e-60, 1e60))
def test_gain_does_not_depend_on_the_unit_of_the_gradient(variance, sqnorm, scale, unit):
    assert anybatch.gain(unit * variance, unit * sqnorm, scale) == pytest.approx(
        anybatch.gain(variance, sqnorm, scale), rel=1e-9
    )


@given(variance=positive, sqnorm=positive, s=st.floats(1, 100), t=st.floats(1, 100))
def test_gains_compose(variance, sqnorm, s, t):
    """Scaling by s and, from there, by t, is scaling by s * t: a batch of s base batches has variance / s."""
    once = anybatch.gain(variance, sqnorm, s * t)
    twice = anybatch.gain(variance, sqnorm, s) * anybatch.gain(variance / s, sqnorm, t)
    assert once == pytest.approx(twice, rel=1e-9)


@given(variance=positive, sqnorm=positive, scale=st.floats(1.001, 1000))
def test_gain_below_scale_one_is_the_way_back(variance, sqnorm, scale):
    """Tuned at the large batch and run at the small one: the inverse of the way up."""
    up = anybatch.gain(variance, sqnorm, scale)
    down = anybatch.gain(variance / scale, sqnorm, 1 / scale)
    assert up * down == pytest.approx(1, rel=1e-9)


@given(variance=positive, sqnorm=positive, scale=scale)
def test_gain_is_the_ratio_of_optimal_learning_rates(variance, sqnorm, scale):
    """McCandlish et al. 2018, equation 2.6: eps_opt(B) = eps_max / (1 + B_noise / B)."""
    noise = variance / sqnorm
    assert anybatch.gain(variance, sqnorm, scale) == pytest.approx((1 + noise) / (1 + noise / scale), rel=1e-9)


@given(
    st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=2, max_size=6),
    st.floats(0.1, 10),
)
def test_moments_reproduce_their_norms(samples, sample):
    """variance / a + sqnorm is the mean square, variance / batch + sqnorm the square of the mean."""
    g = torch.tensor(samples, dtype=torch.float64)
    n = len(samples)
    m1, m2 = float(g.square().sum(1).mean()), float(g.mean(0).square().sum())
    m = anybatch.moments(m1, m2, sample=sample, batch=n * sample)
    assert m.variance / sample + m.sqnorm == pytest.approx(m1, abs=1e-9)
    assert m.variance / (n * sample) + m.sqnorm == pytest.approx(m2, abs=1e-9)
    assert m.variance == pytest.approx(sample * float(g.var(0).sum()), abs=1e-9)


@given(
    raw=st.lists(st.tuples(st.floats(-1, 10), st.floats(-1, 10), st.floats(0.1, 50)), min_size=1, max_size=30),
    smoothing=st.sampled_from([None, "paper", 0.0, 0.5, 0.99]),
    total=st.sampled_from([None, 100.0, 1e5]),
)
def test_averages_are_weighted_means(raw, smoothing, total):
    """Debiased: of equal moments the average is that moment; of any it lies between the extremes."""
    averages = Averages()
    for variance, sqnorm, iterations in raw:
        averages = averages.updated(
            Moments(variance, sqnorm), scale=8, smoothing=smoothing, estimator="unbiased", total=total
        ).moved(iterations)
    low, high = min(r[0] for r in raw), max(r[0] for r in raw)
    assert low - 1e-9 <= averages.moments.variance <= high + 1e-9
    assert 0 <= averages.weight <= 1 + 1e-12


@pytest.mark.parametrize("s", [2, 8, 64])
def test_estimates_are_unbiased(s):
    """Mean over many draws of N = 4 samples of s/4 base batches, against the known covariance."""
    torch.manual_seed(0)
    d, n, repeats = 20, 4, 20000
    sigma, mu = torch.linspace(0.5, 2, d).double(), torch.linspace(0, 0.5, d).double()
    sample = s / n
    g = mu + sigma / sample**0.5 * torch.randn(repeats, n, d, dtype=torch.float64)
    m1, m2 = g.square().sum(2).mean(), g.mean(1).square().sum(1).mean()
    m = anybatch.moments(float(m1), float(m2), sample=sample, batch=s)
    assert m.variance == pytest.approx(float(sigma.square().sum()), rel=0.01)
    assert m.sqnorm == pytest.approx(float(mu.square().sum()), abs=0.02 * float(sigma.square().sum()) / s)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_weighted_samples_fit_the_same_formula(n):
    """Micro-batches of b_i tokens, w_i = b_i / B: v = B/(N-1) * (sum w_i ||g_i||^2 - ||gbar||^2) for one token."""
    torch.manual_seed(n)
    b, g = torch.arange(1.0, n + 1).double(), torch.randn(n, 5).double()
    w, base = b / b.sum(), 3.0
    m1, m2 = float((w * g.square().sum(1)).sum()), float((w @ g).square().sum())
    per_example = float(b.sum()) / (n - 1) * (m1 - m2)
    sample, batch = 1 / float(base * (w / b).sum()), 1 / float(base * (w**2 / b).sum())
    m = anybatch.moments(m1, m2, sample=sample, batch=batch)
    assert m.variance == pytest.approx(per_example / base)
    assert m.sqnorm == pytest.approx(m2 - per_example / float(b.sum()))


# ---- by hand ----


def gain_of(gradients, scale="count", **rule):
    """The gain of one step whose micro-batch gradients are given: the gradient of x @ w is x."""
    gradients = torch.tensor(gradients, dtype=torch.float64)
    model = torch.nn.Linear(gradients.shape[1], 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale=scale, rule=anybatch.AdaScale(**rule))
    for g in gradients:
        (model(g).sum() / len(gradients)).backward()
    optimizer.step()
    if rule.get("estimator", "unbiased") == "unbiased" and controller.gain > 1:
        return controller.gain**2  # after one sample half of the way, in logarithms
    return controller.gain


def test_two_samples_into_a_linear_layer_with_bias():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count")
    for x in ([1.0, 0.0], [0.0, 1.0]):  # ||g||^2 = 2 + 2 for each, 1 + 2 for their mean
        (model(torch.tensor([x])).sum() / 2).backward()
    optimizer.step()
    assert controller.gain == pytest.approx(math.sqrt(4 / 3), rel=1e-12)  # of one sample: half of the way
    assert (controller.variance, controller.sqnorm) == pytest.approx((2, 2))
    assert controller.noise_scale == pytest.approx(1)


@pytest.mark.parametrize("n", [2, 5])
def test_equal_samples_have_gain_one(n):
    assert gain_of([[1.0, 2.0]] * n) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("scale", [2, 4 / 3, 16, 0.5])
def test_opposite_samples_have_the_scale_as_gain(scale):
    assert gain_of([[1.0, 2.0], [-1.0, -2.0]], scale=scale) == pytest.approx(scale)


@pytest.mark.parametrize("scale", [4 / 3, 2, 4])
def test_four_orthogonal_samples_have_the_scale_as_gain(scale):
    assert gain_of(torch.eye(4).tolist(), scale=scale) == pytest.approx(scale)


def test_a_vanishing_gradient_has_gain_one():
    assert gain_of([[0.0, 0.0], [0.0, 0.0]]) == 1


def test_paper_estimator_is_of_the_steps_before_and_starts_at_one():
    """Two base batches a step. By hand, with S = 2 and the means of the steps before: r_0 = 1; after the orthogonal
    pair variance 1, sqnorm 0 and r_1 = 2; after an equal pair, whose variance is clipped to 1e-6, the means are .5 and
    .5 and r_2 = 1 / (.25 + .5); after one more of them 1/3, 2/3 and r_3 = 1 / (1/6 + 2/3).
    """
    pairs = [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    model = torch.nn.ParameterList([p])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = anybatch.AdaScale(estimator="paper", smoothing="paper")
    controller = anybatch.attach(optimizer, model=model, scale="count", rule=rule)
    gains = []
    for pair in pairs:
        for sample in pair:
            (p @ torch.tensor(sample, dtype=torch.float64) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        gains.append(controller.gain)
    assert gains == pytest.approx([1, 2, 1 / 0.75, 1 / (1 / 6 + 2 / 3)], rel=1e-5)


@pytest.mark.parametrize(("raw", "expected"), [((1.0, 1.0), 2.5 / 1.375), ((1.0, 0.0), 4), ((0.0, 1.0), 1)])
def test_a_noise_factor_keeps_the_laws_of_the_gain(raw, expected):
    """S = 4 and 1.5 times the noise: with both moments 1 (1.5 + 1) / (1.5 / 4 + 1); all noise is S still, none is 1."""
    known = Averages(*raw, 1.0, 10**6)
    for rule, factor in ((anybatch.AdaScale(noise_factor=1.5), 1.0), (anybatch.AdaScale(), 1.5)):
        batch, clock = BatchSize(None, None, 4), anybatch.Clock()
        estimator = estimator_of(rule, batch, clock, factor)
        step = estimator.step(RunningMoments(known), ReducedWindow(Shares(4, 4.0, 4.0), {}))
        assert step.gain == pytest.approx(expected, rel=1e-5)
    assert estimator_of(anybatch.AdaScale(estimator="paper"), batch, clock, 1.5).noise_factor == 1


def estimator_of(rule, batch, clock, noise_factor):
    return GainEstimator(
        rule, measurement=rule, batch=batch, clock=clock, exponent=lambda _: 1.0, noise_factor=noise_factor
    )


@pytest.mark.parametrize("estimator", ["unbiased", "paper"])
def test_estimators_against_a_plain_loop(estimator):
    torch.manual_seed(1)
    raw = [(float(v), float(q)) for v, q in torch.randn(40, 2).double() * 2 + 1]
    theta, s = 0.9, 8
    averages = Averages()
    kept = []
    for t, (v, q) in enumerate(raw):
        averages = averages.updated(Moments(v, q), scale=s, smoothing=theta, estimator=estimator, total=None).moved(3.0)
        kept.append((max(v, 1e-6), max(q, 0.0)) if estimator == "paper" else (v, q))
        if estimator == "paper":
            if t < 1 / (1 - theta):
                mean = [sum(k[j] for k in kept) / len(kept) for j in (0, 1)]
            else:
                mean = [theta * m + (1 - theta) * k for m, k in zip(mean, kept[-1], strict=True)]
        else:
            weights = [theta ** (t - k) for k in range(t + 1)]
            mean = [sum(w * k[j] for w, k in zip(weights, kept, strict=True)) / sum(weights) for j in (0, 1)]
        v, q = max(mean[0], 0), max(mean[1], 0)
        expected = 1 if v == 0 else (v + q) / (v / s + q)
        assert averages.gain(s) == pytest.approx(expected, rel=1e-9), t


def test_finding_clipping_before_averaging_is_biased_low():
    """variance/sqnorm = 1000 at S = 8: the true gain is 7.94; clipped first, then averaged, it comes out near 7.7."""
    torch.manual_seed(0)
    s, d, steps = 8, 400, 4000
    mu = torch.zeros(d).double()
    mu[0] = 1.0
    g = mu + (1000 / d) ** 0.5 * torch.randn(steps, s, d, dtype=torch.float64)
    m1, m2 = g.square().sum(2).mean(1), g.mean(1).square().sum(1)
    gains = {}
    for estimator in ("unbiased", "paper"):
        averages = Averages()
        for a, b in zip(m1.tolist(), m2.tolist(), strict=True):
            raw = anybatch.moments(a, b, sample=1, batch=s)
            averages = averages.updated(raw, scale=s, smoothing=0.9995, estimator=estimator, total=None)
        gains[estimator] = averages.gain(s)
    truth = 1001 / (1000 / s + 1)
    assert gains["unbiased"] == pytest.approx(truth, abs=0.05)
    assert gains["paper"] < truth - 0.15


def test_elastic_changes_leave_the_averages_alone():
    """The moments are those of one base batch: at a new scale the gain is right on the first step."""
    averages = Averages().updated(Moments(6.0, 2.0), scale=4, smoothing=0.5, estimator="unbiased", total=None)
    for s in (2, 64, 0.5):
        assert averages.gain(s) == pytest.approx((6 + 2) / (6 / s + 2))


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_bad_scales_are_errors(value):
    assume(not (math.isfinite(value) and value > 0))
    with pytest.raises(anybatch.InvalidValueError, match="scale must be"):
        anybatch.gain(1.0, 1.0, value)


@pytest.mark.parametrize(("sample", "batch"), [(1, 1), (2, 1), (0, 1), (1, math.inf), (-1, 2)])
def test_moments_need_two_samples(sample, batch):
    with pytest.raises(anybatch.InvalidValueError):
        anybatch.moments(1.0, 1.0, sample=sample, batch=batch)


def test_the_first_gains_come_to_the_full_one_step_by_step():
    """Orthogonal pairs have gain 2 at S = 2: after the first half of the way, then half of the rest every two steps."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    model = torch.nn.ParameterList([p])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count")
    for share in (1 / 2, 1 - 1 / 8**0.5, 3 / 4, 1 - 1 / 32**0.5, 7 / 8):
        for sample in ([1.0, 0.0], [0.0, 1.0]):
            (p @ torch.tensor(sample, dtype=torch.float64) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert controller.gain == pytest.approx(2**share)
    assert gain_of([[1.0, 0.0], [0.0, 1.0]], scale=0.5) == pytest.approx(0.5)


@given(st.integers(3, 12), st.integers(2, 5), st.integers(0, 10_000))
def test_law_samples_of_one_pass_are_corrected_to_draws_with_replacement(population, n, seed):
    """Over ALL choices of n of the population's gradients the corrected moments are on average exactly the truth."""
    n = min(n, population)
    torch.manual_seed(seed)
    g = torch.randn(population, 3, dtype=torch.float64) + 0.5
    sqnorm = float(g.mean(0).square().sum())
    variance = float(g.square().sum(1).mean()) - sqnorm
    found = []
    for chosen in itertools.combinations(range(population), n):
        some = g[list(chosen)]
        raw = anybatch.moments(
            float(some.square().sum(1).mean()), float(some.mean(0).square().sum()), sample=1, batch=n
        ).with_replacement(population)
        found.append((raw.variance, raw.sqnorm))
    mean = [sum(each) / len(found) for each in zip(*found, strict=True)]
    assert mean == pytest.approx([variance, sqnorm], rel=1e-9)
