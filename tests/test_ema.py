"""ModelEMA against a plain float64 loop, and the traps of averaging weights."""

import io

import oracle
import pytest
import torch
from common import attach_task
from torch import nn

import anybatch


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def average_of(ema, model):
    with ema.applied():
        return weights(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_against_a_plain_loop(dtype, decay):
    torch.manual_seed(0)
    model = oracle.make_model(dtype=torch.float32).to(dtype)
    ema = anybatch.ModelEMA(model, decay)
    plain = [p.double() for p in weights(model)]
    for k in (1.0, 2.5, 0.0, 17.0, 0.25, 300.0):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update(k)
        plain = [decay**k * a + (1 - decay**k) * p.double() for a, p in zip(plain, weights(model), strict=True)]
    averages = list(ema.state_dict()["averages"].values())
    for mine, theirs in zip(averages, plain, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_trap_a_bfloat16_average_at_a_decay_near_one_moves():
    """The average of a bf16 model is float32: in bf16 a step of 1e-4 of the difference is rounded away."""
    model = nn.Linear(1000, 3, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.zero_()
    ema = anybatch.ModelEMA(model, 0.9999)
    with torch.no_grad():
        model.weight.fill_(1)
    for _ in range(100):
        ema.update()
    average = ema.state_dict()["averages"]["weight"]
    torch.testing.assert_close(average, torch.full_like(average, 1 - 0.9999**100), rtol=1e-4, atol=0)


def test_trap_float32_averages_lose_nothing_to_rounding():
    """`average.mul_(rho).add_(weights, alpha=1 - rho)` rounds the whole average at every step; this the difference."""
    model = nn.Linear(2000, 1, bias=False)
    torch.manual_seed(0)
    ema, rho = anybatch.ModelEMA(model, 0.9999), 0.9999
    plain = model.weight.detach().double()
    rounded = model.weight.detach().clone()
    for _ in range(1000):
        with torch.no_grad():
            model.weight.copy_(1 + 0.01 * torch.randn(1, 2000))
        ema.update()
        plain = rho * plain + (1 - rho) * model.weight.detach().double()
        rounded.mul_(rho).add_(model.weight.detach(), alpha=1 - rho)
    error = (ema.state_dict()["averages"]["weight"] - plain).norm()
    assert error < (rounded - plain).norm() / 3
    assert error / plain.norm() < 1e-6


def test_large_half_precision_parameters_go_through_the_scratch():
    model = nn.Conv2d(750, 750, 2, bias=False, dtype=torch.bfloat16)  # more than two scratches, strides of its own
    model = model.to(memory_format=torch.channels_last)
    start = model.weight.detach().float().clone()
    ema = anybatch.ModelEMA(model, 0.5)
    with torch.no_grad():
        model.weight.mul_(2)
    ema.update()
    torch.testing.assert_close(
        ema.state_dict()["averages"]["weight"], 0.5 * start + 0.5 * model.weight.detach().float()
    )


@pytest.mark.parametrize("rule", [anybatch.AdaScale(), anybatch.Linear()])
def test_follows_the_clock_and_not_the_skipped_steps(rule):
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count", rule=rule, total=100)
    ema = anybatch.ModelEMA(model, 0.9, clock=controller.clock)
    plain = weights(model)
    for t in range(6):
        for i in range(3):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(model(x), y) / 3).backward()
        before = controller.tau
        optimizer.step()
        optimizer.zero_grad()
        k = controller.tau - before
        plain = [0.9**k * a + (1 - 0.9**k) * p for a, p in zip(plain, weights(model), strict=True)]
    for mine, theirs in zip(average_of(ema, model), plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    kept = [a.clone() for a in ema.state_dict()["averages"].values()]
    optimizer.step()  # no gradients: skipped
    assert controller.skipped == 1
    assert all(map(torch.equal, kept, ema.state_dict()["averages"].values()))
    ema.stop()
    controller.clock.advance(5)
    assert all(map(torch.equal, kept, ema.state_dict()["averages"].values()))


def test_the_average_is_one_function_of_tau_at_every_scale():
    """A noisy parabola: with rho**r the averages at S = 8 and S = 1 agree; with rho unscaled they do not."""
    averages = {}
    for scale, scaled in ((1, True), (8, True), (8, False)):
        torch.manual_seed(1)
        model = nn.Linear(200, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        controller = anybatch.attach(optimizer, model=model, scale="count", total=400)
        ema = anybatch.ModelEMA(model, 0.99, clock=controller.clock if scaled else None)
        while not controller.done:
            for _ in range(scale):
                noise = torch.randn(1, 200)
                ((model.weight.square() / 2 + noise * model.weight).sum() / scale).backward()
            optimizer.step()
            optimizer.zero_grad()
            if not scaled:
                ema.update()
        averages[scale, scaled] = float(average_of(ema, model)[0].mean())
    truth = averages[1, True]
    assert averages[8, True] == pytest.approx(truth, abs=0.02)
    assert abs(averages[8, False] - truth) > 0.1


def test_tied_weights_are_averaged_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    start = model["a"].weight.detach().clone()
    ema = anybatch.ModelEMA(model, 0.5)
    with torch.no_grad():
        model["a"].weight.add_(2)
    ema.update()
    assert len(ema.state_dict()["averages"]) == 3
    with ema.applied():
        torch.testing.assert_close(model["a"].weight.detach(), start + 1)
        assert model["b"].weight is model["a"].weight


def test_buffers_and_integers_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = anybatch.ModelEMA(model, 0.5)
    model(torch.randn(8, 3))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    ema.update()
    with ema.applied():
        assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_a_subset_by_name():
    model = oracle.make_model()
    ema = anybatch.ModelEMA(model, 0.5, include=lambda name: name.startswith("2."))
    assert set(ema.state_dict()["averages"]) == {"2.weight", "2.bias"}
    with pytest.raises(anybatch.InvalidValueError, match="nothing to average"):
        anybatch.ModelEMA(model, 0.5, include=lambda name: False)


def test_applied_is_exception_safe_and_refuses_nesting():
    model = oracle.make_model()
    ema = anybatch.ModelEMA(model, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    own = weights(model)
    with pytest.raises(ZeroDivisionError), ema.applied():
        with pytest.raises(anybatch.UsageError, match="nested"), ema.applied():
            pass
        with pytest.raises(anybatch.UsageError, match="inside"):
            ema.update()
        assert not any(map(torch.equal, own, weights(model)))
        raise ZeroDivisionError
    assert all(map(torch.equal, own, weights(model)))


def test_resuming_is_bit_exact_through_weights_only():
    def train(steps, resume_at=None):
        model = oracle.make_model()
        optimizer, controller = attach_task(model)
        ema = anybatch.ModelEMA(model, 0.95, clock=controller.clock)
        for t in range(steps):
            if t == resume_at:
                file = io.BytesIO()
                torch.save(ema.state_dict(), file)
                file.seek(0)
                ema.stop()
                ema = anybatch.ModelEMA(model, 0.95, clock=controller.clock)
                ema.load_state_dict(torch.load(file, weights_only=True))
            for i in range(2):
                x, y = oracle.micro_batch(t, i)
                (oracle.loss_fn(model(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(ema.state_dict()["averages"].values())

    assert all(map(torch.equal, train(8), train(8, resume_at=4)))


@pytest.mark.parametrize("wrong", ["names", "shapes", "version", "foreign"])
def test_trap_the_state_of_another_model_is_refused_not_zipped(wrong):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    ema = anybatch.ModelEMA(model, 0.5)
    state = ema.state_dict()
    if wrong == "names":
        state = anybatch.ModelEMA(nn.Sequential(nn.Linear(3, 3)), 0.5).state_dict()
    elif wrong == "shapes":
        state = anybatch.ModelEMA(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), 0.5).state_dict()
    elif wrong == "version":
        state["version"] = 99
    else:
        state = {"module": 1}
    kept = {n: a.clone() for n, a in ema.state_dict()["averages"].items()}
    with pytest.raises(anybatch.StateError):
        ema.load_state_dict(state)
    assert all(torch.equal(kept[n], a) for n, a in ema.state_dict()["averages"].items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_is_in_range(decay):
    with pytest.raises(anybatch.InvalidValueError, match="decay"):
        anybatch.ModelEMA(oracle.make_model(), decay)


@pytest.mark.parametrize("iterations", [-1, float("inf")])
def test_iterations_are_in_range(iterations):
    with pytest.raises(anybatch.InvalidValueError, match="iterations"):
        anybatch.ModelEMA(oracle.make_model(), 0.9).update(iterations)
