"""What used to be silent, or an error of another kind than promised: one test each."""

import copy
import pickle

import oracle
import pytest
import torch
from torch import nn

import anybatch


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def attached(model=None, **options):
    """A small model, its optimizer and its controller; every backward is one base batch."""
    model = oracle.make_model() if model is None else model
    optimizer = sgd(model)
    options = {} if {"scale", "base_batch"} & options.keys() else {"scale": "count"} | options
    return model, optimizer, anybatch.attach(optimizer, model=model, **options)


def backward(model, i=0, *, share=1.0):
    x, y = oracle.micro_batch(0, i)
    (oracle.loss_fn(model(x), y) * share).backward()


# ---- what attach is given ----


class WantsAMetric:
    last_epoch = 0

    def step(self, metric):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("model", None, "nn.Module"),
        ("process_group", 3, "ProcessGroup"),
        ("grad_scaler", object(), "GradScaler"),
        ("scheduler", WantsAMetric(), "wants an argument"),
        ("scale", 10**400, "positive, finite"),
        pytest.param("scale", 10**5000, "thousands of digits", id="an int of 5,000 digits"),
        ("scale", True, "positive, finite"),
        ("scale", "eight", "positive, finite"),
        ("reduction", None, "mean"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_at_attach(option, value, said):
    model = oracle.make_model()
    options = {"model": model, "scale": 2.0} | {option: value}
    with pytest.raises(anybatch.InvalidValueError, match=said):
        anybatch.attach(sgd(model), **options)
    anybatch.attach(sgd(model), model=model, scale=2.0)  # nothing of the failed one is left


def test_an_optimizer_without_a_learning_rate_is_refused():
    class Plain(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self):
            raise NotImplementedError

    model = oracle.make_model()
    with pytest.raises(anybatch.UnsupportedError, match="without a learning rate"):
        anybatch.attach(Plain(model.parameters()), model=model, scale=2, rule=anybatch.AdaScale(exponent=1))


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(anybatch.InvalidValueError, match="meta device"):
        anybatch.attach(sgd(model), model=model, scale=2)


@pytest.mark.parametrize(
    "said",
    [
        anybatch.Scaling(1.0, 0.0),
        anybatch.Scaling(float("nan"), 1.0),
        anybatch.Scaling(1.0, float("inf")),
        anybatch.Scaling(-1.0, 1.0),
        (1.0, 1.0),
    ],
    ids=str,
)
def test_what_a_rule_says_is_checked_before_anything_moves(said):
    class Mine(anybatch.Rule):
        def __call__(self, *, scale, gain, clock, exponent):
            return said if clock.tau else anybatch.Scaling(1.0, 1.0)

    model = oracle.make_model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale=2, rule=Mine())
    backward(model)
    optimizer.step()
    before = copy.deepcopy([list(model.parameters()), optimizer.state_dict()])
    with pytest.raises(anybatch.InvalidValueError, match="Mine.*returned"):
        optimizer.step()
    assert str([list(model.parameters()), optimizer.state_dict()]) == str(before)
    assert (controller.tau, controller.steps) == (1, 1)


def test_a_rate_that_was_set_after_a_step_that_raised_stays():
    class Fragile(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("a kernel failed")
            return super().step(closure)

    model = oracle.make_model()
    optimizer = Fragile([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.5)
    anybatch.attach(optimizer, model=model, scale=4.0, rule=anybatch.Linear())
    backward(model)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.025
    Fragile.fails = False
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025] + [0.1] * (len(optimizer.param_groups) - 1)


# ---- what a gradient may be ----


def test_conjugated_complex_gradients_are_measured():
    """A gradient may come with torch's lazy conjugation; its norm is that of its numbers."""
    weight = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128))
    model = nn.ParameterList([weight])
    optimizer = torch.optim.SGD([weight], lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count")
    x = torch.tensor([1 - 1j, 2 + 1j], dtype=torch.complex128)
    grads = []
    for factor in (1.0, 3.0):
        weight_grad = torch.autograd.grad((factor * (weight.conj() * x)).sum().real / 2, weight)[0]
        grads.append(weight_grad.resolve_conj())
        ((factor * (weight.conj() * x)).sum().real / 2).backward()
    optimizer.step()
    m1 = sum((2 * g).abs().square().sum().item() for g in grads) / 2
    m2 = sum(grads).abs().square().sum().item()
    assert controller.variance == pytest.approx(2 * (m1 - m2), rel=1e-12)
