"""The accumulation chosen while training: by efficiency and by the schedule, on real data."""

from itertools import pairwise
from statistics import fmean

import pytest
import torch
from torch.nn.functional import cross_entropy

import anybatch
from anybatch._demo.digits import digits, gradients, network

TOTAL = 1200


def train(make, *, rule=None, chooser=None, schedule=None, seed=0, total=TOTAL):
    """One run on the digits at base batch 8; the accumulation is 1 without a chooser."""
    x, y, x_test, y_test = digits()
    net = network(seed)
    optimizer = make(net.parameters())
    scheduler = schedule(optimizer) if schedule else None
    rule = rule or anybatch.AdaScale()
    controller = anybatch.attach(
        optimizer, model=net, rule=rule, scheduler=scheduler, total=total, base_batch=8, micro_batch=8
    )
    choose = chooser(controller) if chooser else None
    order = torch.Generator().manual_seed(seed)
    chosen = []
    while not controller.done:
        n = choose.accumulation if choose else 1
        rows = torch.randint(len(x), (n, 8), generator=order)
        controller.observe(gradients(net, x[rows], y[rows]))
        optimizer.step()
        optimizer.zero_grad()
        chosen.append(n)
    with torch.no_grad():
        logits = net(x_test)
    return chosen, float((logits.argmax(1) == y_test).double().mean()), float(cross_entropy(logits, y_test))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


def test_its_averages_begin_with_nothing():
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count", total=100)
    batch = anybatch.BatchController(controller, efficiency=0.8, bounds=(2, 8))
    assert batch.state_dict() == {"scale": 2, "variance": 0, "sqnorm": 0}


@pytest.mark.slow
def test_the_batch_grows_with_the_noise_and_examples_keep_their_worth():
    base = [train(sgd, rule=anybatch.Identity(), seed=seed) for seed in range(2)]
    runs = [
        train(sgd, chooser=lambda c: anybatch.BatchController(c, efficiency=0.5, bounds=(2, 256)), seed=seed)
        for seed in range(2)
    ]
    for chosen, _, _ in runs:
        assert fmean(chosen[-20:]) > 3 * fmean(chosen[:20])
        assert len(chosen) < TOTAL / 4
        assert max(after / before for before, after in pairwise(chosen)) <= 2
    assert fmean(r[1] for r in runs) > fmean(r[1] for r in base) - 0.01
    # The last loss of a run whose rate never falls: another rounding of one norm moves it by a quarter.
    assert fmean(r[2] for r in runs) < 1.5 * fmean(r[2] for r in base)


@pytest.mark.parametrize("efficiency", [0.5, 0.7, 0.9])
def test_the_worth_of_an_example_stays_above_the_target_and_near_it(efficiency):
    chosen, _, _ = train(sgd, chooser=lambda c: anybatch.BatchController(c, efficiency=efficiency, bounds=(2, 4096)))
    assert efficiency - 0.02 < TOTAL / sum(chosen) < efficiency + 0.12


def test_the_batch_shrinks_where_the_noise_falls():
    """Noise of 100 times the variance in the first half of the run."""
    weights = torch.nn.ParameterList([torch.zeros(2000)])
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.0)
    controller = anybatch.attach(optimizer, model=weights, total=400, scale="count")
    batch = anybatch.BatchController(controller, efficiency=0.5, bounds=(2, 1000))
    generator = torch.Generator().manual_seed(0)
    at_half = None
    while not controller.done:
        late = controller.tau > 200
        at_half = batch.accumulation if late and at_half is None else at_half
        noise = torch.randn(batch.accumulation, 2000, generator=generator) * (1.0 if late else 10.0)
        controller.observe([1 + noise])
        optimizer.step()
    assert at_half == pytest.approx(100 + 2, rel=0.2)  # noise scale of 100 base batches at an efficiency of 1/2
    assert batch.accumulation == pytest.approx(1 + 2, abs=1)


def test_bounds_hold_and_are_checked():
    weights = torch.nn.ParameterList([torch.zeros(2)])
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=weights, total=50, scale="count")
    for bounds in [(0, 4), (4, 2), (2, 2.5), (True, 4), 8, (2,), (1, 2, 3)]:
        with pytest.raises(anybatch.InvalidValueError, match="bounds"):
            anybatch.BatchController(controller, bounds=bounds)
    with pytest.raises(anybatch.InvalidValueError, match="one rank the lower bound"):
        anybatch.BatchController(controller, bounds=(1, 4))
    with pytest.raises(anybatch.InvalidValueError, match="efficiency"):
        anybatch.BatchController(controller, efficiency=1.0, bounds=(2, 4))
    batch = anybatch.BatchController(controller, efficiency=0.5, bounds=(2, 4))
    while not controller.done:
        controller.observe([torch.randn(batch.accumulation, 2)])  # nothing but noise
        optimizer.step()
    assert batch.accumulation == 4


def test_a_fixed_scale_and_a_rule_that_measures_nothing_are_refused():
    for options, match in [({"scale": 4}, "fixed number"), ({"scale": "count", "rule": anybatch.Linear()}, "AdaScale")]:
        weights = torch.nn.ParameterList([torch.zeros(2)])
        controller = anybatch.attach(torch.optim.SGD(weights.parameters(), lr=0.1), model=weights, **options)
        with pytest.raises(anybatch.UsageError, match=match):
            anybatch.BatchController(controller, bounds=(2, 4))


def test_state_goes_on_exactly():
    def make():
        weights = torch.nn.ParameterList([torch.ones(8)])
        optimizer = torch.optim.SGD(weights.parameters(), lr=1e-3)
        controller = anybatch.attach(optimizer, model=weights, total=400, scale="count")
        return weights, optimizer, controller, anybatch.BatchController(controller, efficiency=0.6, bounds=(2, 64))

    def steps(parts, n, seed):
        weights, optimizer, controller, batch = parts
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for _ in range(n):
            chosen.append(batch.accumulation)
            controller.observe([weights[0].detach() + 3 * torch.randn(chosen[-1], 8, generator=generator)])
            optimizer.step()
        return chosen

    first = make()
    steps(first, 20, 0)
    second = make()
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    assert steps(first, 20, 1) == steps(second, 20, 1)
    good = second[3].state_dict()
    for bad in [{"scale": 4}, {**good, "more": 1}, {**good, "scale": float("nan")}, {**good, "sqnorm": "x"}]:
        with pytest.raises(anybatch.StateError, match=r"needs exactly|not a finite number"):
            second[3].load_state_dict(bad)
    assert second[3].state_dict() == good


def test_a_resumed_batch_is_the_same_scale_at_another_micro_batch():
    def make(micro_batch):
        weights = torch.nn.ParameterList([torch.zeros(4)])
        optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
        controller = anybatch.attach(
            optimizer, model=weights, total=100, base_batch=8, micro_batch=micro_batch, rule=anybatch.AdaScale()
        )
        return anybatch.BatchController(controller, bounds=(2, 64))

    first, second = make(8), make(32)
    first.load_state_dict({**first.state_dict(), "scale": 16.0})
    assert first.accumulation == 16
    second.load_state_dict(first.state_dict())
    assert second.accumulation == 4


def test_stop_and_what_needs_a_schedule_or_no_variance():
    weights = torch.nn.ParameterList([torch.zeros(4)])
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
    controller = anybatch.attach(
        optimizer, model=weights, total=50, scale="count", rule=anybatch.AdaScale(consecutive=True)
    )
    batch = anybatch.BatchController(controller, bounds=(1, 8))
    controller.clock.advance(1.0)  # by hand, before any step
    assert batch.accumulation == 1
    batch.stop()
    controller.observe([torch.randn(2, 4)])
    optimizer.step()
    assert batch.accumulation == 1
    with pytest.raises(anybatch.UsageError, match="schedule"):
        anybatch.Seesaw(controller, bounds=(1, 8))


@pytest.mark.slow
def test_seesaw_takes_fewer_steps_for_the_same_examples_and_loss():
    def step_decay(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=TOTAL // 3, gamma=0.25)

    base = [train(adam, rule=anybatch.Identity(), schedule=step_decay, seed=seed) for seed in range(3)]
    runs = [
        train(adam, rule=anybatch.SquareRoot(), schedule=step_decay, seed=seed,
              chooser=lambda c: anybatch.Seesaw(c, bounds=(1, 64)))
        for seed in range(3)
    ]  # fmt: skip
    for chosen, _, _ in runs:
        assert chosen == [1] * 400 + [4] * 100 + [16] * 25
    assert fmean(r[2] for r in runs) == pytest.approx(fmean(r[2] for r in base), rel=0.15)


def test_seesaw_under_adascale_stops_at_the_noise_scale():
    weights = torch.nn.ParameterList([torch.ones(50)])
    optimizer = torch.optim.SGD(weights.parameters(), lr=1e-9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=150, gamma=1e-3)
    controller = anybatch.attach(optimizer, model=weights, scheduler=scheduler, total=400, scale="count")
    batch = anybatch.Seesaw(controller, bounds=(2, 10_000))
    generator = torch.Generator().manual_seed(0)
    before = []
    while not controller.done:
        if controller.tau < 149:
            before.append(batch.accumulation)
        controller.observe([1 + 3 * torch.randn(batch.accumulation, 50, generator=generator)])
        optimizer.step()
    assert set(before) == {2}
    assert batch.accumulation == pytest.approx(9, abs=2)  # variance 450 over sqnorm 50, and not 2000


def test_without_a_total_pure_noise_doubles_the_batch_in_a_thousand_base_iterations():
    """2 * 2 ** (tau / 1000) comes to 3 at tau = 1000 * log2(1.5) = 585, up to one step of 2."""
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = anybatch.attach(optimizer, model=model, scale="count")
    batch = anybatch.BatchController(controller, efficiency=0.5, bounds=(2, 8))
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    while batch.accumulation == 2:
        controller.observe([opposite[:, None, :]])
        optimizer.step()
        optimizer.zero_grad()
    assert 585 <= controller.tau <= 587
