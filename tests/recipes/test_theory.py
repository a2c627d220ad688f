"""The propositions and theorems of the paper, on small runs of recipes/theory.py and on the library itself."""

from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch
from recipes import theory

RUNS = 4000
QUADRATIC, SINE = theory.quadratic(), theory.sine()


def run(problem, scale, rule):
    return theory.simulate(problem, scale, rule=rule, runs=RUNS, total=theory.HORIZON / problem.gamma)


def assert_below(curve, problem, xi=1.0):
    """At every step, with four standard errors for the finite number of runs."""
    for tau, excess, spread in zip(curve.tau, curve.excess, curve.spread, strict=True):
        assert excess <= problem.bound(tau, xi) * (1 + 1e-9) + 4 * spread, f"at tau {tau}"


@pytest.mark.parametrize("problem", [QUADRATIC, SINE], ids=lambda p: p.name)
def test_the_constants_are_true_of_the_functions(problem):
    w = torch.linspace(-15, 15, 60_001, dtype=torch.float64).unsqueeze(1).requires_grad_()
    value = problem.value(w)
    (slope,) = torch.autograd.grad(value.sum(), w, create_graph=True)
    assert torch.allclose(slope, problem.slope(w))
    (curvature,) = torch.autograd.grad(slope.sum(), w)
    assert curvature.abs().max() <= problem.beta + 1e-9
    assert bool((slope.square().sum(1) >= 2 * problem.alpha * value * (1 - 1e-5)).all())
    assert bool((curvature < 0).any()) == (problem is SINE)


@pytest.mark.parametrize("problem", [QUADRATIC, SINE], ids=lambda p: p.name)
@pytest.mark.parametrize("scale", [1, 4, 8])
def test_theorems_1_and_2_hold_at_every_step(problem, scale):
    assert scale <= 1 / problem.gamma
    assert_below(run(problem, scale, "expected"), problem)


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_the_floor_of_adascale_is_delta_at_every_scale(scale):
    assert theory.floor(run(QUADRATIC, scale, "expected")) == pytest.approx(QUADRATIC.delta, rel=0.03)


@pytest.mark.parametrize("scale", [2, 8, 16])
def test_theorem_3_holds_and_its_floor_is_met(scale):
    curve = run(QUADRATIC, scale, "linear")
    assert_below(curve, QUADRATIC, QUADRATIC.xi(scale))
    assert theory.floor(curve) == pytest.approx(QUADRATIC.xi(scale) * QUADRATIC.delta, rel=0.03)


def test_linear_scaling_diverges_beyond_its_limit_and_adascale_does_not():
    assert QUADRATIC.xi(64) == inf
    assert run(QUADRATIC, 64, "linear").excess[-1] > 1000
    assert run(QUADRATIC, 64, "expected").excess[-1] < 3 * QUADRATIC.delta


def test_own_gains_lie_a_little_above_the_floor():
    assert 1.02 < theory.floor(run(QUADRATIC, 8, "own")) / QUADRATIC.delta < 1.15


def test_the_library_reaches_the_floor_with_estimated_gains():
    curve = theory.measured(QUADRATIC, 8, runs=20, total=theory.HORIZON / QUADRATIC.gamma)
    assert 0.5 < theory.floor(curve) / QUADRATIC.delta < 1.15


@given(st.floats(0, 1e6), st.floats(1e-9, 1e6), st.floats(1, 1e4))
def test_a_step_of_gain_r_has_the_expected_squared_length_of_r_base_steps(variance, sqnorm, scale):
    r = anybatch.gain(variance, sqnorm, scale)
    assert r**2 * (variance / scale + sqnorm) == pytest.approx(r * (variance + sqnorm), rel=1e-9)


@pytest.mark.filterwarnings("ignore:At scale .* an example is worth:anybatch.AnybatchWarning")
def test_proposition_1_without_noise_identity_scaling_is_exact():
    """All samples are the full gradient: a run at scale 16 is the run at scale 1, step by step."""

    def train(scale):
        weights = torch.nn.ParameterList([torch.tensor([2.0, -1.0], dtype=torch.float64)])
        optimizer = torch.optim.SGD(weights.parameters(), lr=0.1, momentum=0.9)
        controller = anybatch.attach(optimizer, model=weights, total=50, scale="count")
        path = []
        while not controller.done:
            controller.observe([weights[0].detach().expand(scale, 2) * torch.tensor([1.0, 3.0])])
            optimizer.step()
            path.append(weights[0].detach().clone())
        return torch.stack(path)

    one, sixteen = train(1), train(16)
    assert len(one) == len(sixteen) == 50
    assert torch.allclose(one, sixteen, rtol=1e-9)


def test_proposition_2_with_large_variance_linear_scaling_is_exact():
    """eta^2 V held, eta to 0: the excess of S = 8 at equal samples comes to that of S = 1; by the exact recursion."""

    def excess(eta, variance, scale, samples):
        value = 0.5
        for _ in range(samples // scale):
            value = (1 - scale * eta) ** 2 * value + (scale * eta) ** 2 * variance / scale / 2
        return value

    gaps = []
    for eta in (0.02, 0.002, 0.0002):
        variance, samples = 0.01 / eta, int(1.6 / eta)
        gaps.append(abs(excess(eta, variance, 8, samples) / excess(eta, variance, 1, samples) - 1))
        mean_square = variance + 1.0
        assert anybatch.gain(variance, 1.0, 8) == pytest.approx(mean_square / (variance / 8 + 1))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert anybatch.gain(1e9, 1.0, 8) == pytest.approx(8, rel=1e-7)
