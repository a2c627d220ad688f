"""Progressive scaling: the scale as a function of tau."""

import oracle
import pytest
import torch
from torch.optim import lr_scheduler

import anybatch


def test_the_scale_is_constant_between_its_starts():
    progressive = anybatch.Progressive({24: 8, 0: 1, 8.5: 0.5})
    taus = (0, 8.4, 8.5, 23, 24 - 1e-12, 24, 1e9)
    assert [progressive.scale(tau) for tau in taus] == [1, 1, 0.5, 0.5, 8, 8, 8]


def test_the_rounding_of_a_long_sum_does_not_delay_a_change():
    clock = anybatch.Clock()
    for _ in range(1000):
        clock.advance(0.1)
    assert clock.tau < 100
    assert anybatch.Progressive({0: 1, 100: 2}).scale(clock.tau) == 2


@pytest.mark.parametrize("scales", [{}, {1: 2}, {0: 0}, {0: -1}, {0: 1, -1: 2}, {0: float("nan")},
                                    {0: 1, float("inf"): 2}, {0: 1, "8": 2}, {0: "4"}])  # fmt: skip
def test_scales_in_range(scales):
    with pytest.raises(anybatch.InvalidValueError, match=r"scale|start"):
        anybatch.Progressive(scales)


def test_the_schedule_of_megatron():
    """By hand: a base batch of 768 sequences of 4096 tokens is 3,145,728 tokens."""
    found = anybatch.Progressive.parse("0:768 250B:1536  500b:3072 1.5T:6144", base_batch=768, tokens=4096)
    assert found.scales == pytest.approx({0: 1, 250e9 / 3145728: 2, 500e9 / 3145728: 4, 1.5e12 / 3145728: 8})
    assert anybatch.Progressive.parse("0:16 2K:48 3000:64", base_batch=32).scales == {0: 0.5, 62.5: 1.5, 93.75: 2}


def test_under_a_fixed_rule_the_batch_changes_at_that_number_of_examples():
    progressive = anybatch.Progressive.parse("0:4 40:8 120:16", base_batch=4)
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = anybatch.attach(optimizer, model=model, rule=anybatch.Linear(), total=90, base_batch=4, micro_batch=4)
    examples, batches = 0, []
    while not controller.done:
        parts = int(progressive.scale(controller.tau))
        for i in range(parts):
            x, y = oracle.micro_batch(controller.steps, i)
            (oracle.loss_fn(model(x), y) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        batches.append((examples, 4 * parts))
        examples += 4 * parts
    assert {batch: min(at for at, b in batches if b == batch) for batch in (4, 8, 16)} == {4: 0, 8: 40, 16: 120}


@pytest.mark.parametrize(
    "schedule",
    ["", "0", "0:", ":4", "0:4 B:8", "0:4 1X:8", "0:4 0:8", "1:4", "0:-4", "0:0", "0:nan", "nan:4 0:4", 7, None],
)
def test_a_schedule_in_another_form(schedule):
    with pytest.raises(anybatch.InvalidValueError):
        anybatch.Progressive.parse(schedule, base_batch=4)


@pytest.mark.parametrize("values", [{"base_batch": 0}, {"base_batch": "4"}, {"base_batch": 4, "tokens": -1}])
def test_the_units_of_a_schedule_are_positive(values):
    with pytest.raises(anybatch.InvalidValueError, match="must be positive"):
        anybatch.Progressive.parse("0:4", **values)


def test_with_a_controller_the_scale_is_what_happens():
    """`scale(controller.tau)` micro-batches a step: the controller counts them."""
    progressive = anybatch.Progressive({0: 1, 10: 2, 30: 4})
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    controller = anybatch.attach(
        optimizer, model=model, rule=anybatch.Linear(), scheduler=scheduler, total=60, base_batch=4, micro_batch=4
    )
    ema = anybatch.ModelEMA(model, 0.9, clock=controller.clock)
    scales, steps = [], 0
    while not controller.done:
        parts = int(progressive.scale(controller.tau))
        for i in range(parts):
            x, y = oracle.micro_batch(steps, i)
            (oracle.loss_fn(model(x), y) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.append(controller.scale)
        steps += 1
    assert scales == [1] * 10 + [2] * 10 + [4] * 8
    assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.eta_min, abs=1e-3)
    assert ema.state_dict()["decay"] == 0.9
