"""controller.peek(): the gain between the last backward and the step; a look changes nothing."""

import math

import oracle
import pytest
import torch
from common import attach_task

import anybatch

WAYS = {"mean": {}, "sum": {"reduction": "sum"}}


def train(*, look, steps=6, n=3, **options):
    """Gains by peek, gains after the step, weights."""
    model = oracle.make_model()
    optimizer, controller = attach_task(model, **options)
    seen, gains = [], []
    for t in range(steps):
        for i in range(n):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(model(x), y) / (1 if options.get("reduction") == "sum" else n)).backward()
            if look:
                seen.append(controller.peek())
        optimizer.step()
        optimizer.zero_grad()
        gains.append(controller.gain)
    return seen, gains, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("options", WAYS.values(), ids=list(WAYS))
def test_the_last_look_is_the_steps_gain_and_no_look_changes_anything(options):
    seen, gains, weights = train(look=True, **options)
    _, undisturbed, others = train(look=False, **options)
    assert gains == undisturbed
    assert all(map(torch.equal, weights, others))
    assert seen[2::3] == gains
    assert len(set(gains)) > 3


def test_between_steps_it_is_the_last_gain():
    model = oracle.make_model()
    optimizer, controller = attach_task(model)
    assert math.isnan(controller.peek())
    for i in range(2):
        x, y = oracle.micro_batch(0, i)
        (oracle.loss_fn(model(x), y) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert controller.peek() == controller.gain


@pytest.mark.parametrize("backwards", [1, 2])
def test_a_micro_batch_of_several_backwards_is_looked_at_after_its_end(backwards):
    model, twin = oracle.make_model(), oracle.make_model()
    optimizer, controller = attach_task(model)
    plain, other = attach_task(twin)
    for i in range(3):
        with controller.together():
            for j in range(backwards):
                x, y = oracle.micro_batch(0, backwards * i + j)
                (oracle.loss_fn(model(x), y) / 3).backward()
            with pytest.raises(anybatch.UsageError, match="after it, not in it"):
                controller.peek()
            with pytest.raises(anybatch.UsageError, match="after it, not in it"):
                optimizer.step()
        sum(oracle.loss_fn(twin(x), y) / 3 for x, y in (oracle.micro_batch(0, backwards * i + j)
                                                         for j in range(backwards))).backward()  # fmt: skip
        assert controller.peek() == pytest.approx(other.peek(), rel=1e-12, nan_ok=True)
    optimizer.step()
    plain.step()
    assert controller.gain == pytest.approx(other.gain, rel=1e-12)
    assert controller.gain > 1


def test_a_rule_that_measures_nothing_has_none():
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, rule=anybatch.Linear(), scale="count")
    x, y = oracle.micro_batch(0, 0)
    oracle.loss_fn(model(x), y).backward()
    assert math.isnan(controller.peek())


def test_gradients_that_are_not_finite_have_none_and_do_not_count():
    model = oracle.make_model()
    optimizer, controller = attach_task(model)
    for i in range(2):
        x, y = oracle.micro_batch(0, i)
        (math.inf * oracle.loss_fn(model(x), y)).backward()
    assert math.isnan(controller.peek())
    optimizer.step()
    assert (controller.steps, controller.skipped) == (0, 1)


def test_state_saved_between_a_look_and_the_step_is_that_of_before():
    model = oracle.make_model()
    optimizer, controller = attach_task(model)
    states = []
    for t in range(3):
        for i in range(2):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(model(x), y) / 2).backward()
        states.append(controller.state_dict())
        controller.peek()
        assert controller.state_dict() == states[-1]
        optimizer.step()
        optimizer.zero_grad()
    assert states[0] != states[1] != states[2]
