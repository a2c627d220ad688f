"""One process, several backwards a step: the controller against the plain loop of the paper's Algorithm 2."""

from contextlib import nullcontext

import oracle
import pytest
import torch
from common import attach_task

import anybatch


def train(steps, counts, *, dtype=torch.float64, sample=1.0, use_closure=False):
    model = oracle.make_model(dtype=dtype)
    optimizer, controller = attach_task(model, sample=sample)
    gains, taus = [], []
    for t in range(steps):
        n = counts[t % len(counts)]

        def backwards():
            optimizer.zero_grad()
            for i in range(n):
                x, y = oracle.micro_batch(t, i, dtype=dtype)
                (oracle.loss_fn(model(x), y) / n).backward()

        if use_closure:
            optimizer.step(backwards)
        else:
            backwards()
            optimizer.step()
        gains.append(controller.gain)
        taus.append(controller.tau)
    return gains, taus, [p.detach() for p in model.parameters()]


def assert_same(run, expected, tolerance=1e-6):
    for mine, theirs in zip(run[0], expected[0], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    for mine, theirs in zip(run[1], expected[1], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    for mine, theirs in zip(run[2], expected[2], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", [(2,), (3,), (5,), (2, 5, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("sample", [1.0, 0.5, 4.0, 0.125])
def test_agrees_with_algorithm_2(counts, sample):
    """Also where S differs from N (a sample is not a base batch), and where S is fractional or below 1."""
    expected = oracle.adascale(steps=14, counts=counts, sample=sample)
    blind = 1 in counts and sample != 1  # the steps of a single micro-batch show no variance, and say so
    with pytest.warns(anybatch.AnybatchWarning) if blind else nullcontext():
        run = train(14, counts, sample=sample)
    assert_same(run, expected)


def test_agrees_with_algorithm_2_in_closures_and_float32():
    expected = oracle.adascale(steps=14, counts=(3,))
    assert_same(train(14, (3,), use_closure=True), expected)
    assert_same(train(14, (3,), dtype=torch.float32), expected, tolerance=2e-5)


def test_scale_as_a_number_and_by_count_are_the_same_thing():
    expected = oracle.adascale(steps=12, counts=(4,), sample=2.0)
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(oracle.TOTAL))
    controller = anybatch.attach(optimizer, model=model, scheduler=scheduler, total=oracle.TOTAL, scale=8)
    for t in range(12):
        for i in range(4):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(model(x), y) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert controller.gain == pytest.approx(expected[0][t], rel=1e-6)
        assert (controller.scale, controller.count) == (8, 4)


def test_summed_gradients_say_so():
    """reduction="sum": the moments are those of the mean, whatever the accumulation; the sum is applied."""
    runs = {}
    for reduction in ("mean", "sum"):
        model = oracle.make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        controller = anybatch.attach(optimizer, model=model, scale="count", reduction=reduction)
        for t, n in enumerate((4, 2, 3)):
            for i in range(n):
                x, y = oracle.micro_batch(t, i)
                (oracle.loss_fn(model(x), y) / (n if reduction == "mean" else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs[reduction] = (controller.variance, controller.sqnorm, controller.gain)
    assert runs["sum"] == pytest.approx(runs["mean"], rel=1e-9)


def test_unequal_micro_batches_are_unbiased():
    """Micro-batches of 2 and 6 examples, each its own mean, averaged with equal weights: the variance of one base batch
    of 4 comes out right on average, and so does the squared mean."""
    torch.manual_seed(0)
    d, sigma2, repeats = 50, 1.0, 4000
    mu = torch.full((d,), 0.3, dtype=torch.float64)
    model = torch.nn.Linear(d, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = anybatch.attach(
        optimizer, model=model, base_batch=4, micro_batch=2, rule=anybatch.AdaScale(smoothing=0.9999)
    )
    for _ in range(repeats):
        for size in (2, 6, 6):
            controller.micro_batch = size
            x = mu + (sigma2 / size) ** 0.5 * torch.randn(d, dtype=torch.float64)  # the gradient is the input
            (model(x) / 3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    harmonic = 3 / (1 / 2 + 1 / 6 + 1 / 6)
    assert controller.scale == pytest.approx(3 * harmonic / 4)
    assert controller.variance == pytest.approx(d * sigma2 / 4, rel=0.01)
    assert controller.sqnorm == pytest.approx(float(mu @ mu), rel=0.03)


def test_observe_equals_the_loop():
    expected = oracle.adascale(steps=12, counts=(3,))
    model = oracle.make_model()
    optimizer, controller = attach_task(model)
    gains, taus = [], []
    for t in range(12):
        grads = []
        for i in range(3):
            x, y = oracle.micro_batch(t, i)
            grads.append(torch.autograd.grad(oracle.loss_fn(model(x), y), list(model.parameters())))
        controller.observe([torch.stack(g) for g in zip(*grads, strict=True)])
        optimizer.step()
        optimizer.zero_grad()
        gains.append(controller.gain)
        taus.append(controller.tau)
    assert_same((gains, taus, [p.detach() for p in model.parameters()]), expected)


def test_consecutive_gradients_show_variance_and_mean():
    """One gradient a step at a scale of 4: this one and the one before are unbiased where the mean stays."""
    torch.manual_seed(0)
    d, scale = 50, 4
    mu = torch.full((d,), 0.2, dtype=torch.float64)
    model = torch.nn.Linear(d, 1, bias=False, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = anybatch.AdaScale(consecutive=True, smoothing=0.9999)
    controller = anybatch.attach(optimizer, model=model, scale=scale, rule=rule)
    for step in range(6000):
        x = mu + torch.randn(d, dtype=torch.float64) / scale**0.5  # variance d for one base batch
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            assert controller.gain == 1  # nothing to compare with yet
    assert controller.variance == pytest.approx(d, rel=0.02)
    assert controller.sqnorm == pytest.approx(float(mu @ mu), rel=0.05)
    assert controller.gain == pytest.approx((d + 2) / (d / scale + 2), rel=0.02)
