"""attach(scale=1): the training of the plain loop, bit for bit, and its noise scale in examples."""

import math

import pytest
import torch
from torch import nn

import anybatch

STEPS, BATCH = 40, 16


def trained(make, *, attach=None, parts=2):
    """Weights, optimizer state and rates of an ordinary loop that steps its own schedule, and the controller."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 150), nn.Tanh(), nn.Linear(150, 150), nn.Tanh(), nn.Linear(150, 1))
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=STEPS)
    controller = None if attach is None else anybatch.attach(optimizer, model=model, scale=1, **attach)
    rates = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 6)
        for part in x.split(BATCH // parts):
            ((model(part) - part.sum(1, keepdim=True)).square().mean() / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    if controller is not None:
        controller.detach()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return [*model.parameters(), *tensors], rates, controller


OPTIMIZERS = {
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"base_batch": BATCH, "record": 3}], ids=str)
def test_the_training_is_that_of_the_plain_loop_bit_for_bit(name, options, tmp_path):
    """No warning either: the loop goes on to step its own scheduler."""
    record = {"record": anybatch.RunRecord(tmp_path / "run.jsonl", per_layer=3)} if "record" in options else {}
    plain, rates, _ = trained(OPTIMIZERS[name])
    measured, same, controller = trained(OPTIMIZERS[name], attach={**options, **record})
    assert len(plain) > 6
    assert all(map(torch.equal, plain, measured))
    assert rates == same
    assert (controller.steps, controller.tau, controller.lr_factor) == (STEPS, STEPS, 1.0)
    assert 0 < controller.noise_scale < math.inf


def test_the_noise_scale_is_in_examples_where_the_batch_is_said():
    *_, batches = trained(OPTIMIZERS["AdamW"], attach={})
    *_, examples = trained(OPTIMIZERS["AdamW"], attach={"base_batch": BATCH})
    assert examples.noise_scale == BATCH * batches.noise_scale


def test_it_is_that_of_a_plain_loop(tmp_path):
    """A gradient of known noise: weights that never move, and data of which half is signal."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = anybatch.attach(optimizer, model=model, scale=1, base_batch=BATCH, record=tmp_path / "run.jsonl")
    variance = square = weight = 0.0
    for _ in range(200):
        x = torch.randn(BATCH, 8).double() + 0.5
        grads = []
        for half in x.split(BATCH // 2):
            (model(half).mean() / 2).backward()
            grads.append(half.mean(0))  # of the linear model's mean
        optimizer.step()
        optimizer.zero_grad()
        mean = (grads[0] + grads[1]) / 2
        spread = float(sum((g - mean).square().sum() for g in grads))  # of two halves, over n - 1 = 1
        variance = 0.999 * variance + 0.001 * spread / 2  # a half's covariance is twice the whole batch's
        square = 0.999 * square + 0.001 * (float(mean.square().sum()) - spread / 2)
        weight = 0.999 * weight + 0.001
    assert controller.noise_scale == pytest.approx(BATCH * variance / square, rel=1e-9)
    assert controller.noise_scale == pytest.approx(8 / (8 * 0.25), rel=0.2)  # the truth: one example's noise over mu^2
    controller.detach()
    found = anybatch.forecast(tmp_path / "run.jsonl", [1, 4])
    assert found.unit == "examples"
    assert (found.recorded, found.scales[0].steps.value) == (1.0, 200)


def test_one_gradient_a_step_shows_none_and_says_so():
    with pytest.warns(anybatch.AnybatchWarning, match="so there is no noise scale.*anybatch.split"):
        *_, controller = trained(OPTIMIZERS["AdamW"], attach={"base_batch": BATCH}, parts=1)
    assert math.isnan(controller.noise_scale)


@pytest.mark.parametrize(
    "options",
    [{"scale": 2}, {"scale": "count"}, {"scale": 1, "micro_batch": 8}, {"scale": True}, {"scale": torch.ones(2)}],
)
def test_beside_another_scale_a_base_batch_is_an_error(options):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(anybatch.InvalidValueError, match="training is only measured"):
        anybatch.attach(optimizer, model=model, base_batch=8, **options)
