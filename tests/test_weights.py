"""Losses that are means over the tokens of a whole step, and a divisor that is not the number of micro-batches."""

import math

import pytest
import torch
from distributed import launch, weight_workers
from distributed.weight_workers import TASKS, attached, plain_step
from hypothesis import given, settings
from hypothesis import strategies as st

import anybatch


def stepped(lengths, *, weights=None, seed=0, **options):
    """One step over micro-batches of `lengths` tokens; the controller and the weights."""
    model, optimizer, controller = attached(**options)
    total = sum(lengths)
    for i, n in enumerate(lengths):
        if weights is not None:
            controller.weight = weights[i]
        x, y = TASKS(seed, i, n)
        ((model(x) - y).square().sum() / total).backward()
    optimizer.step()
    return controller, model.weight.detach().clone()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    unit=st.sampled_from([1.0, 0.5, 3.0, 1e-6]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_moments_are_those_of_the_formula(lengths, unit, seed):
    effective = sum(lengths) ** 2 / sum(n * n for n in lengths)
    if effective < 1.0001:
        return
    controller, weights = stepped(lengths, weights=[unit * n for n in lengths], seed=seed)
    variance, sqnorm, gain, after = plain_step([TASKS(seed, i, n) for i, n in enumerate(lengths)], scale=len(lengths))
    averages = controller._run.running.averages.moments
    assert averages.variance == pytest.approx(variance, rel=1e-9, abs=1e-12)
    assert averages.sqnorm == pytest.approx(sqnorm, rel=1e-9, abs=1e-12)
    assert controller.gain == pytest.approx(gain, rel=1e-9)
    assert (controller.count, controller.scale) == (len(lengths), len(lengths))
    torch.testing.assert_close(weights, after, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [8, 12])
def test_equal_lengths_are_a_mean(length):
    lengths = [length] * 3
    weighted, after = stepped(lengths, weights=lengths)
    plain, others = stepped(lengths)
    assert weighted.state_dict() == plain.state_dict()
    assert torch.equal(after, others)


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_the_variance_is_that_of_many_draws(skew):
    """Against brute force: the variance of a step's gradient over 1,000 draws, with lengths that differ by the skew."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    lengths = [max(1, round(16 * math.exp(skew * z - skew**2 / 2))) for z in torch.randn(4, generator=generator)]
    model, optimizer, controller = attached(rule=anybatch.AdaScale(smoothing=0.999, decays="constant"), lr=0.0)
    gradients = []
    for seed in range(1000):
        for i, n in enumerate(lengths):
            controller.weight = n
            x, y = TASKS(seed, i, n)
            ((model(x) - y).square().sum() / sum(lengths)).backward()
        gradients.append(model.weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    stacked = torch.stack(gradients)
    truth = (stacked - stacked.mean(0)).square().sum((1, 2)).mean() * len(lengths)
    assert controller.variance == pytest.approx(float(truth), rel=0.1)


def test_a_micro_batch_without_tokens_counts_in_the_scale_alone():
    controller, _ = stepped([5, 0, 7], weights=[5, 0, 7])
    assert (controller.count, controller.scale) == (3, 3)
    variance, sqnorm, *_ = plain_step([TASKS(0, 0, 5), TASKS(0, 2, 7)], scale=3)
    assert controller.variance == pytest.approx(max(variance, 0.0), rel=1e-9)
    assert controller.sqnorm == pytest.approx(max(sqnorm, 0.0), rel=1e-9)


def test_one_that_has_all_the_weight_shows_no_variance():
    controller, _ = stepped([5, 0], weights=[5, 0])
    assert (controller.gain, controller.steps) == (1, 1)
    assert math.isnan(controller.variance)


@pytest.mark.parametrize("weight", [-1, math.nan, "5", None, True])
def test_what_is_no_weight(weight):
    _, _, controller = attached()
    with pytest.raises(anybatch.InvalidValueError, match="weight must be a finite number"):
        controller.weight = weight


def test_weights_that_make_no_mean():
    with pytest.raises(anybatch.UsageError, match="all 0"):
        stepped([3, 3], weights=[0, 0])
    with pytest.raises(anybatch.UsageError, match="leave reduction out"):
        stepped([3, 3], weights=[3, 3], reduction="sum")
    model, optimizer, controller = attached()
    controller.weight = 3
    for i in range(2):
        x, y = TASKS(0, i, 3)
        ((model(x) - y).square().sum() / 6).backward()
    with pytest.raises(anybatch.UsageError, match="1 of the 2 micro-batches of this step had a weight"):
        optimizer.step()
    assert controller.steps == 0


def test_a_rule_that_counts_nothing_has_no_use_for_a_weight():
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, rule=anybatch.Linear(), scale=2)
    assert controller.weight is None
    with pytest.raises(anybatch.UsageError, match="neither measures nor counts"):
        controller.weight = 3


# ---- a known divisor ----


def divided(n, divisor, **options):
    """One step over n micro-batches, each loss divided by `divisor`."""
    model, optimizer, controller = attached(**options)
    for i in range(n):
        x, y = TASKS(0, i, 4)
        ((model(x) - y).square().mean() / divisor).backward()
    optimizer.step()
    return controller.state_dict(), model.weight.detach()


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_a_partial_window_divided_by_the_full_accumulation_is_the_mean(n):
    state, weights = divided(n, 4, reduction=4)
    expected, others = divided(n, n)
    assert state == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(weights, others, rtol=1e-12, atol=0)


def test_a_divisor_of_one_is_the_sum():
    state, weights = divided(3, 1, reduction=1)
    expected, others = divided(3, 1, reduction="sum")
    assert state == expected
    assert torch.equal(weights, others)


@pytest.mark.parametrize("reduction", [0, -4, True, 2.5, "four", None])
def test_what_is_no_reduction(reduction):
    with pytest.raises(anybatch.InvalidValueError, match="reduction must be"):
        attached(reduction=reduction)


def test_parts_share_by_the_divisor():
    _, _, controller = attached(reduction=4)
    assert [share for _, share in controller.parts(torch.zeros(6, 2), 2)] == [0.25, 0.25]


# ---- several ranks ----


def test_two_ranks_are_one_process():
    lengths = [7, 3, 11, 5]
    controller, weights = stepped(lengths, weights=lengths)
    for mine in launch.run(weight_workers.steps, world=2, args=(lengths,)):
        assert mine["peek"] == mine["gain"] == pytest.approx(controller.gain, rel=1e-9)
        assert mine["scale"] == 4
        state = {**controller.state_dict(), "backwards": 0}  # not used over several ranks
        assert mine["state"] == pytest.approx(state, rel=1e-9)
        torch.testing.assert_close(mine["weights"], weights, rtol=1e-9, atol=1e-12)


def test_a_weight_on_one_rank_alone_is_an_error_on_both():
    for rank in launch.run(weight_workers.one_sided, world=2):
        assert "2 of the 4 micro-batches of this step had a weight" in rank


def test_a_sum_over_the_ranks_is_an_error_and_their_mean_is_measured_in_shards():
    lengths = (9, 2, 5, 4)
    *_, gain, weights = plain_step([TASKS(0, i, n) for i, n in enumerate(lengths)], scale=4)
    for summed, (found, moved) in launch.run(weight_workers.sharded, world=2, args=(lengths,)):
        assert "set_gradient_divide_factor" in summed
        assert found == pytest.approx(gain, rel=1e-9)
        torch.testing.assert_close(moved, weights)
