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
