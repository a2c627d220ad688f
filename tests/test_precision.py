"""float16 and bfloat16: autocast, GradScaler, and half-precision parameters."""

import math

import oracle
import pytest
import torch

import anybatch
from anybatch._gradients import Norms


def brute_force(gradients):
    """Variance and squared mean of one micro-batch's gradient, from stored gradients, in float64."""
    flat = torch.stack([torch.cat([g.double().flatten() for g in sample]) for sample in gradients])
    n = len(flat)
    deviation = float((flat - flat.mean(0)).square().sum()) / (n - 1)
    return deviation, float(flat.mean(0).square().sum()) - deviation / n


OPTIMIZERS = {
    "loop": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def train(make, *, scaler=None, give_scaler=True, overflow_at=(), steps=9, unscale=False):
    model = oracle.make_model(dtype=torch.float32)
    optimizer = make(model.parameters())
    controller = anybatch.attach(
        optimizer, model=model, scale="count", total=200, grad_scaler=scaler if give_scaler else None
    )
    history = []
    for t in range(steps):
        for i in range(3):
            x, y = oracle.micro_batch(t, i, dtype=torch.float32)
            loss = oracle.loss_fn(model(x), y) / 3
            if t in overflow_at and i == 1:
                loss = loss * math.inf
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            if t not in overflow_at:
                optimizer.step()
        else:
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        history.append((controller.tau, controller.gain, controller.variance, controller.sqnorm))
    return history, [p.detach() for p in model.parameters()], controller


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_that_grows_and_backs_off_changes_nothing(name, unscale):
    """Factors of 2 up every second step, and down after an overflow: the moments keep their unit."""
    overflow = (2, 6)
    plain, plain_parameters, plain_controller = train(OPTIMIZERS[name], overflow_at=overflow)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    scaled, parameters, controller = train(OPTIMIZERS[name], scaler=scaler, overflow_at=overflow, unscale=unscale)
    assert scaler.get_scale() != 64.0
    assert controller.steps == plain_controller.steps == 7
    for mine, theirs in zip(scaled, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for p, q in zip(parameters, plain_parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_skips_are_counted_where_the_optimizer_is_called():
    """A fused optimizer's step runs on skipped steps too, and is counted; the others' is not even called."""
    for name, skipped in (("fused", 1), ("loop", 0)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        _, _, controller = train(OPTIMIZERS[name], scaler=scaler, overflow_at=(3,), steps=5)
        assert (controller.steps, controller.skipped) == (4, skipped)


def test_without_the_scaler_every_gain_is_still_right_in_its_own_step():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    plain, _, _ = train(OPTIMIZERS["loop"])
    scaled, _, _ = train(OPTIMIZERS["loop"], scaler=scaler, give_scaler=False)
    assert [s[1] for s in scaled] == pytest.approx([p[1] for p in plain], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    """Norms of half-precision gradients are exact for the gradients as they are."""
    model = oracle.make_model(dtype=torch.float32).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = anybatch.attach(optimizer, model=model, scale="count", rule=anybatch.AdaScale(smoothing=0.0))
    gradients = []
    for i in range(2):  # halving is exact, so the observed gradients are exactly half of the stored ones
        x, y = oracle.micro_batch(0, i, dtype=dtype)
        gradients.append(torch.autograd.grad(oracle.loss_fn(model(x), y), list(model.parameters())))
        (oracle.loss_fn(model(x), y) / 2).backward()
    kept = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    m1 = sum(float(g.double().square().sum()) for sample in gradients for g in sample) / 2
    m2 = sum(float(g.double().square().sum()) for g in kept)
    expected = anybatch.moments(m1, m2, sample=1, batch=2)
    assert controller.variance == pytest.approx(max(expected.variance, 0), rel=1e-5)
    assert controller.sqnorm == pytest.approx(max(expected.sqnorm, 0), rel=1e-5)


def test_autocast():
    model = oracle.make_model(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = anybatch.attach(optimizer, model=model, scale="count", rule=anybatch.AdaScale(smoothing=0.0))
    gradients = []
    for i in range(4):
        x, y = oracle.micro_batch(0, i, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = oracle.loss_fn(model(x), y)
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
        (loss / 4).backward()
    optimizer.step()
    variance, sqnorm = brute_force(gradients)
    assert controller.variance == pytest.approx(variance, rel=0.02)
    assert controller.sqnorm == pytest.approx(max(sqnorm, 0), rel=0.05, abs=0.02 * variance)


@pytest.mark.parametrize(("samples", "mean"), [("cpu", "meta"), ("meta", "cpu")])
def test_norms_of_a_model_on_two_devices_are_divided_where_they_lie(samples, mean):
    """A model's first gradient and its first `.grad` may lie on different devices."""
    norms = Norms(torch.full((2,), 8.0, device=samples), torch.full((2,), 4.0, device=mean))
    found = norms.over(torch.tensor(4.0))
    assert (found.samples.device.type, found.mean.device.type) == (samples, mean)
    host, value = (found.samples, 2.0) if samples == "cpu" else (found.mean, 1.0)
    assert host.tolist() == [value, value]
