"""Arguments of a wrong type are errors that name the argument, whatever was given."""

import math

import pytest
import torch
from torch import nn

import anybatch

HUGE = pytest.param(10**400, id="huge")
NO_NUMBER = ["3", "", True, math.nan, math.inf, HUGE, -1, [2], {}, 1j, object()]


def refused(name, make, *args, **options):
    with pytest.raises(anybatch.InvalidValueError, match=name) as caught:
        make(*args, **options)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [*NO_NUMBER, None, 1.0, "0.9", (0.9, "0.99"), (0.9, True), [], (0.9, 0.9), b"\x00"])
def test_a_decay(value):
    refused("decay", anybatch.ModelEMA, nn.Linear(2, 2), value)


@pytest.mark.parametrize("value", [*NO_NUMBER, 0])
def test_numbers_of_an_average(value):
    model = nn.Linear(2, 2)
    refused("base_batch", anybatch.ModelEMA, model, 0.9, base_batch=value)
    refused("update_every", anybatch.ModelEMA, model, 0.9, update_every=value)
    refused("span", anybatch.half_life, value)
    refused("base_batch", anybatch.half_life, 100, base_batch=value)
    refused("start", anybatch.cosine_decay, value, total=10)
    refused("total", anybatch.cosine_decay, 0.9, total=value)
    refused("end", anybatch.cosine_decay, 0.9, total=10, end=value)
    if value != 0:
        ema = anybatch.ModelEMA(model, 0.9, base_batch=8)
        refused("iterations", ema.update, value)
        refused("batch_size", ema.update, batch_size=value)
        assert ema.tau == 0
        refused("A decay", anybatch.ModelEMA(model, lambda _: value).update)


@pytest.mark.parametrize("value", [None, 1.5, 0])
def test_a_number_of_updates(value):
    refused("update_every", anybatch.ModelEMA, nn.Linear(2, 2), 0.9, update_every=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("clock", 3), ("clock", "controller"), ("include", "weight"), ("include", None), ("warmup", "yes"), ("warmup", 1),
     ("average_statistics", None), ("device", "nowhere"), ("device", 1.5), ("device", [])],
)  # fmt: skip
def test_other_arguments_of_an_average(name, value):
    refused(name, anybatch.ModelEMA, nn.Linear(2, 2), 0.9, **{name: value})


@pytest.mark.parametrize("model", [None, "model", {}, [torch.zeros(1)], 3])
def test_a_model(model):
    refused("model", anybatch.ModelEMA, model, 0.9)


def controller_of():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    return anybatch.attach(optimizer, model=model, scheduler=scheduler, scale="count", total=10)


@pytest.mark.parametrize("make", [anybatch.BatchController, anybatch.Seesaw])
def test_who_chooses_the_batch(make):
    for wrong in (None, "controller", 3, nn.Linear(2, 1), anybatch.Clock()):
        refused("controller", make, wrong, bounds=(2, 4))
    controller = controller_of()
    followers = controller.clock.subscribers
    for bounds in (
        None,
        "24",
        (2, "4"),
        (2, True),
        (2, 10**400),
        (10**400, 10**400),
        (2, math.nan),
        (2.0, 4.0),
        {2, 4},
    ):
        refused("bounds", make, controller, bounds=bounds)
    assert controller.clock.subscribers == followers


@pytest.mark.parametrize("value", [*NO_NUMBER, None, 0, 1])
def test_an_efficiency(value):
    refused("efficiency", anybatch.BatchController, controller_of(), efficiency=value, bounds=(2, 4))


@pytest.mark.parametrize("value", [*NO_NUMBER, None])
def test_starts_and_scales(value):
    refused("scale", anybatch.Progressive, {0: 1, 20: value})
    if value.__hash__ is not None:
        refused("start", anybatch.Progressive, {0: 1, value: 4})
    refused("scales", anybatch.Progressive, value)
    refused("tau", anybatch.Progressive({0: 1, 20: 4}).scale, value)
