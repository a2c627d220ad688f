"""Containers of the form of torchtitan's: an Optimizer of optimizers, and one LambdaLR for each of them.

Written from the description of torchtitan's classes (commit b5bcd76); its own trainer is not run here.
"""

import io
import math
import warnings

import oracle
import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import anybatch


class OptimizersContainer(Optimizer):
    """An optimizer for each kind of parameters; its own groups have parameters and no values."""

    def __init__(self, optimizers):
        self.optimizers = list(optimizers)
        members = [p for each in self.optimizers for group in each.param_groups for p in group["params"]]
        Optimizer.__init__(self, members, {})

    def __iter__(self):
        return iter(self.optimizers)

    def __len__(self):
        return len(self.optimizers)

    def step(self, closure=None):
        for each in self.optimizers:
            each.step()

    def zero_grad(self, set_to_none=True):
        for each in self.optimizers:
            each.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        """One flat dictionary by the parameters' names; a state that is missing is made by a step of length 0."""
        flat = {}
        for each in self.optimizers:
            fill(each)
            saved = each.state_dict()
            names = {}
            for group in saved["param_groups"]:
                for number, name in zip(group["params"], group["param_names"], strict=True):
                    names[number] = name
                    others = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                    flat |= {f"param_groups.{name}.{key}": value for key, value in others.items()}
            for number, entries in saved["state"].items():
                flat |= {f"state.{names[number]}.{key}": value for key, value in entries.items()}
        return flat

    def load_state_dict(self, flat):
        for each in self.optimizers:
            fill(each)
            state, groups, number = {}, [], 0
            for group in each.param_groups:
                names, first = group["param_names"], number
                for p, name in zip(group["params"], names, strict=True):
                    state[number] = {key: flat[f"state.{name}.{key}"] for key in each.state[p]}
                    number += 1
                keys = [key for key in group if key not in ("params", "param_names")]
                values = {key: flat[f"param_groups.{names[0]}.{key}"] for key in keys}
                groups.append({"params": list(range(first, number)), **values})
            each.load_state_dict({"state": state, "param_groups": groups})


def fill(optimizer):
    """Make the state by a step with zero gradients and a learning rate of 0."""
    members = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.state or any(p.grad is not None for p in members):
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for p in members:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


class LRSchedulersContainer:
    """A LambdaLR for each optimizer of a container, of which the position is saved."""

    def __init__(self, optimizers, factor):
        self.schedulers = [LambdaLR(each, factor) for each in optimizers]

    def step(self):
        for each in self.schedulers:
            each.step()

    def rates(self):
        return [rate for each in self.schedulers for rate in each.get_last_lr()]

    def state_dict(self):
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state):
        for each in self.schedulers:
            each.last_epoch = state["last_epoch"]
            each._step_count = state["last_epoch"] + 1
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "To get the last learning rate", UserWarning)  # torch's, of get_lr
                each._last_lr = each.get_lr()


class Derived(OptimizersContainer):
    """As of a fault-tolerant trainer."""


def build(container=OptimizersContainer, *, cls=SGD, **options):
    model = oracle.make_model()
    named = list(model.named_parameters())
    options = {"lr": oracle.LR, **({"momentum": oracle.MOMENTUM} if cls is SGD else {}), **options}
    optimizers = container([cls(named[:1], **options), cls(named[1:], **options)])
    schedulers = LRSchedulersContainer(optimizers, lambda i: oracle.cosine(i) / oracle.LR)
    controller = anybatch.attach(
        optimizers, model=model, scheduler=schedulers, total=oracle.TOTAL, base_batch=4, micro_batch=4
    )
    return model, optimizers, schedulers, controller


def train(model, optimizers, schedulers, steps, *, count=4):
    """The order of torchtitan's `train_step`: both containers are stepped by the trainer."""
    for t in steps:
        optimizers.zero_grad()
        for i in range(count):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(model(x), y) / count).backward()
        optimizers.step()
        schedulers.step()


@pytest.mark.parametrize("container", [OptimizersContainer, Derived])
def test_the_containers_train_as_the_plain_loop(container):
    gains, taus, weights = oracle.adascale(steps=12, counts=(4,))
    model, optimizers, schedulers, controller = build(container)
    for t, (gain, tau) in enumerate(zip(gains, taus, strict=True)):
        train(model, optimizers, schedulers, [t])
        assert controller.gain == pytest.approx(gain, rel=1e-10)
        assert controller.tau == pytest.approx(tau, rel=1e-10)
        assert schedulers.rates() == pytest.approx([oracle.cosine(math.floor(tau))] * 2, rel=1e-12)
    for p, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)


def test_the_containers_step_is_given_back():
    model, optimizers, schedulers, controller = build()
    train(model, optimizers, schedulers, range(3))
    at = schedulers.state_dict()["last_epoch"]
    assert at == math.floor(controller.tau)
    assert all(isinstance(each, anybatch.HeldScheduler) for each in schedulers.schedulers)
    controller.detach()
    assert all(type(each) is LambdaLR for each in schedulers.schedulers)
    schedulers.step()
    assert schedulers.state_dict()["last_epoch"] == at + 1


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_resumed_run_goes_on_bit_for_bit(cls):
    """As a trainer loads: the new containers give their own state as the pattern, then take the saved one."""
    ends = []
    for saved_at in (None, 5):
        model, optimizers, schedulers, controller = build(cls=cls)
        train(model, optimizers, schedulers, range(5))
        if saved_at is not None:
            saved = model.state_dict(), optimizers.state_dict(), schedulers.state_dict()
            saved = torch.load(written(saved), weights_only=False)
            model, optimizers, schedulers, controller = build(cls=cls)
            assert set(optimizers.state_dict()) == set(saved[1])
            model.load_state_dict(saved[0])
            optimizers.load_state_dict(saved[1])
            schedulers.load_state_dict(saved[2])
        train(model, optimizers, schedulers, range(5, 10))
        ends.append((controller.tau, controller.steps, [p.tolist() for p in model.parameters()]))
    assert ends[0] == ends[1]


def written(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def test_the_pattern_of_a_state_moves_neither_weights_nor_clock():
    model, optimizers, schedulers, controller = build(cls=AdamW)
    before = [p.tolist() for p in model.parameters()]
    optimizers.state_dict()
    assert [p.tolist() for p in model.parameters()] == before
    assert (controller.tau, controller.steps, controller.skipped) == (0, 0, 0)
    train(model, optimizers, schedulers, [0])
    assert controller.steps == 1


def test_a_container_has_one_controller():
    model, optimizers, _, controller = build()
    for again in (optimizers, optimizers.optimizers[1]):
        with pytest.raises(anybatch.UsageError, match="has a controller already"):
            anybatch.attach(again, model=model, scale="count")
    controller.detach()


def test_an_optimizer_of_optimizers_under_another_name_is_none():
    class Other(Optimizer):
        def __init__(self, optimizers):
            self.optimizers = list(optimizers)
            super().__init__([p for each in self.optimizers for p in each.param_groups[0]["params"]], {})

    model = oracle.make_model()
    other = Other([SGD(model.parameters(), lr=0.1)])
    with pytest.raises(anybatch.UnsupportedError):
        anybatch.attach(other, model=model, scale="count")
