"""Every torch scheduler, driven to floor(tau): after any moves of the clock, the rate of as many single steps."""

import math
import random
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as ls

import anybatch

SCHEDULERS = {
    "LambdaLR": lambda o: ls.LambdaLR(o, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda o: ls.MultiplicativeLR(o, lambda i: 0.99),
    "StepLR": lambda o: ls.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: ls.MultiStepLR(o, [5, 6, 40], 0.1),
    "ConstantLR": lambda o: ls.ConstantLR(o, 0.3, 9),
    "LinearLR": lambda o: ls.LinearLR(o, 0.1, 1.0, 20),
    "ExponentialLR": lambda o: ls.ExponentialLR(o, 0.97),
    "PolynomialLR": lambda o: ls.PolynomialLR(o, 50, 2.0),
    "CosineAnnealingLR": lambda o: ls.CosineAnnealingLR(o, 60),
    "CosineAnnealingWarmRestarts": lambda o: ls.CosineAnnealingWarmRestarts(o, 7, 2),
    "CyclicLR": lambda o: ls.CyclicLR(o, 0.01, 0.1, 9),
    "OneCycleLR": lambda o: ls.OneCycleLR(o, 0.5, total_steps=61),
    "SequentialLR": lambda o: ls.SequentialLR(o, [ls.LinearLR(o, 0.1, 1.0, 10), ls.CosineAnnealingLR(o, 50)], [10]),
    "ChainedScheduler": lambda o: ls.ChainedScheduler([ls.ConstantLR(o, 0.1, 6), ls.ExponentialLR(o, 0.98)]),
    "nested": lambda o: ls.ChainedScheduler(
        [ls.SequentialLR(o, [ls.ConstantLR(o, 0.1, 4), ls.LinearLR(o, 0.5, 1.0, 9)], [5]), ls.ExponentialLR(o, 0.9)]
    ),
}


class Moves(anybatch.Linear):
    """Moves the clock by whatever the test says."""

    def __call__(self, *, scale, gain, clock, exponent):
        return anybatch.Scaling(1.0, next_move[0])


next_move = [1.0]


def build(make, **options):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
    return model, optimizer, scheduler


def step(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:The schedule does not fit total")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_driven_to_the_floor_of_tau(name, seed):
    _, reference, scheduler = build(SCHEDULERS[name])
    rates = []
    for _ in range(61):
        rates.append((reference.param_groups[0]["lr"], reference.param_groups[0]["momentum"]))
        step(reference)
        if len(rates) < 61:
            scheduler.step()
    model, optimizer, scheduler = build(SCHEDULERS[name])
    controller = anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2, total=60)
    moves = random.Random(seed)
    while not controller.done:
        next_move[0] = moves.choice([0.3, 1.0, 2.5, 9.0])
        step(optimizer)
        group = optimizer.param_groups[0]
        expected = rates[min(math.floor(controller.tau + 1e-9), 60)] if controller.tau < 61 else None
        if expected is not None:
            assert (group["lr"], group["momentum"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nested", [False, True])
def test_one_cycle_is_held_at_its_end(nested):
    def make(o):
        cycle = ls.OneCycleLR(o, 0.5, total_steps=20)
        return ls.SequentialLR(o, [ls.ConstantLR(o, 1.0), cycle], [5]) if nested else cycle

    model, optimizer, scheduler = build(make)
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 7.0
    for _ in range(10):
        step(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 25 / 1e4)


def test_reduce_on_plateau_is_left_alone():
    model, optimizer, scheduler = build(lambda o: ls.ReduceLROnPlateau(o, factor=0.1, patience=0))
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 4.0
    for _ in range(3):
        step(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    step(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "SequentialLR", "ChainedScheduler"])
def test_trap_a_scheduler_that_somebody_else_steps_too(name):
    model, optimizer, scheduler = build(SCHEDULERS[name])
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 2.0
    step(optimizer)
    scheduler.step()
    with pytest.raises(anybatch.UsageError, match=r"remove scheduler.step\(\)"):
        step(optimizer)


def test_trap_the_gain_is_not_baked_into_a_recursive_schedule():
    """Schedules such as ExponentialLR multiply group["lr"]: the rate must be back before they are stepped."""
    model, optimizer, scheduler = build(lambda o: ls.ExponentialLR(o, 0.9))
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=anybatch.Linear(), scale=4)
    for i in range(1, 6):
        step(optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9 ** (4 * i))


def test_a_resume_that_forgets_the_scheduler_is_an_error():
    model, optimizer, scheduler = build(SCHEDULERS["CosineAnnealingLR"])
    controller = anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 3.0
    step(optimizer)
    saved = controller.state_dict()
    model, optimizer, scheduler = build(SCHEDULERS["CosineAnnealingLR"])
    controller = anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    controller.load_state_dict(saved)
    with pytest.raises(anybatch.UsageError, match="load the scheduler's state"):
        step(optimizer)


def test_attaching_in_the_middle_of_a_schedule():
    model, optimizer, scheduler = build(SCHEDULERS["CosineAnnealingLR"])
    for _ in range(10):
        step(optimizer)
        scheduler.step()
    anybatch.attach(optimizer, model=model, scheduler=scheduler, rule=Moves(), scale=2)
    next_move[0] = 5.0
    step(optimizer)
    assert scheduler.last_epoch == 15
