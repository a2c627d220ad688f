"""Deterministic costs of one step: dispatched operations, tensors of a parameter's size, reads by the host."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import anybatch
from anybatch._gradients import fingerprint

LAYERS, WIDTH, ACCUMULATION = 6, 200, 3  # weights of 40,000 entries are large, biases of 200 small


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """On a host gradients are looked at, first rows of one parameter, which waits for nothing; on a device not."""
    monkeypatch.setattr(fingerprint, "_on_host", lambda _: False)


class Ops(TorchDispatchMode):
    """Counts operations, and results of at least a weight's size that share no memory with an argument."""

    def __init__(self):
        super().__init__()
        self.ops, self.large, self.normed = Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self.ops[name.split(".")[1]] += 1
        self.normed += args[0].numel() if name.startswith("aten.linalg_vector_norm") else 0
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.numel() >= WIDTH**2 and t.untyped_storage().data_ptr() not in given:
                self.large += 1
        return result


def count(steps=1, per_layer=None, **attach):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if per_layer is not None:
        attach["record"] = anybatch.RunRecord(attach["record"], per_layer=per_layer)
    if attach:
        anybatch.attach(optimizer, model=model, scale="count", total=100, **attach)

    def step():
        for _ in range(ACCUMULATION):
            (model(torch.ones(2, WIDTH)).square().mean() / ACCUMULATION).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # slots and momentum buffers are made once
    with Ops() as ops:
        for _ in range(steps):
            step()
    return ops


@pytest.mark.parametrize("attach", [{"rule": anybatch.AdaScale()}, {"rule": anybatch.Linear()}], ids=str)
def test_no_tensor_of_a_parameters_size(attach):
    assert count(steps=3, **attach).large == count(steps=3).large


def test_a_copy_of_the_gradient_for_consecutive_gradients_alone():
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    anybatch.attach(optimizer, model=model, scale=4, rule=anybatch.AdaScale(consecutive=True))
    large = []
    for _ in range(4):
        with Ops() as ops:
            model(torch.ones(1, WIDTH)).square().mean().backward()
        large.append(ops.large)
        optimizer.step()
        optimizer.zero_grad()
    assert large[0] == large[1] + 1
    assert large[1:] == large[1:2] * 3


def test_operations_of_a_window():
    """A large gradient's rows are one operation, and what is left over one; small ones take a few for all of them. The
    gradients of each backward, and `.grad` after the last."""
    extra = count(rule=anybatch.AdaScale()).ops
    extra.subtract(count().ops)
    assert extra["linalg_vector_norm"] == LAYERS * (ACCUMULATION + 1) * 2
    assert extra["cat"] == ACCUMULATION + 2  # one block each, and the two norms for the host
    assert extra["dot"] == ACCUMULATION + 1
    assert sum(extra.values()) < 9 * LAYERS * (ACCUMULATION + 1) + 15 * ACCUMULATION + 30


def test_each_gradient_is_read_once_and_their_sum_once_a_step():
    """Entries that operations of ours take, in units of the parameters; small ones are copied first."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    anybatch.attach(optimizer, model=model, scale="count", total=100)
    for step in range(2):
        with Ops() as ops:
            for _ in range(ACCUMULATION):
                (model(torch.ones(2, 512)).square().mean() / ACCUMULATION).backward()
            optimizer.step()
        optimizer.zero_grad()
        sums = ACCUMULATION - 1 if step == 0 else 1  # how many backwards a window has is known from the one before
        assert ops.normed == (ACCUMULATION + sums) * 3 * 512**2


def test_a_step_that_is_not_due_dispatches_less_than_counting_does():
    """A fixed rule reads each gradient once a step, for entries that are not finite."""
    every = anybatch.AdaScale(every=1000, smoothing="paper")  # the first is over where `count` begins
    extra = count(steps=3, rule=anybatch.Linear()).ops
    extra.subtract(count(steps=3, rule=every).ops)
    assert {name: n for name, n in extra.items() if n} == {"_foreach_norm": 3, "_local_scalar_dense": 3 * 2 * LAYERS}


def test_a_parameter_costs_one_hook(tmp_path):
    model = nn.Linear(3, 2)
    for rule in (anybatch.AdaScale(), anybatch.Linear()):
        anybatch.attach(torch.optim.SGD(model.parameters()), model=model, scale="count", rule=rule)
    assert [len(p._backward_hooks) for p in model.parameters()] == [2, 2]
    assert [p._post_accumulate_grad_hooks for p in model.parameters()] == [None, None]
    anybatch.attach(torch.optim.SGD(model.parameters()), model=model, scale=4, rule=anybatch.Linear())
    assert [len(p._backward_hooks) for p in model.parameters()] == [2, 2]
    optimizer = torch.optim.SGD(model.parameters())
    anybatch.attach(optimizer, model=model, scale=1, record=anybatch.RunRecord(tmp_path / "run.jsonl", per_layer=1))
    assert [len(p._backward_hooks) for p in model.parameters()] == [3, 3]


def test_layers_cost_nothing_but_at_the_steps_that_are_measured_by_layer(tmp_path):
    """There a norm of its own for each gradient and for their sum: three operations for a large one, one for a small
    one; and a few sums."""
    plain, measured = (count(steps=3, record=tmp_path / f"{each}.jsonl", per_layer=each) for each in (None, 4))
    assert measured.ops == plain.ops  # the first step was measured by layer, the fifth is next
    assert measured.large == plain.large
    at_each = count(steps=3, record=tmp_path / "1.jsonl", per_layer=1)
    assert at_each.large == plain.large
    extra = at_each.ops
    extra.subtract(plain.ops)
    assert extra["linalg_vector_norm"] == 3 * (ACCUMULATION + 1) * LAYERS * (3 + 1)
    assert sum(extra.values()) <= 3 * ((ACCUMULATION + 1) * LAYERS * 10 + 30)


def test_counting_dispatches_nothing_in_the_backward():
    extra = count(rule=anybatch.Linear()).ops
    extra.subtract(count().ops)
    assert sum(abs(n) for n in extra.values()) <= 12 + 1 + 2 * LAYERS  # the check of the step's gradients


def test_a_fixed_rule_with_a_number_reads_each_gradient_once():
    torch.manual_seed(0)
    counts = []
    for attach in (False, True):
        model = nn.Linear(WIDTH, WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if attach:
            anybatch.attach(optimizer, model=model, scale=4, rule=anybatch.Linear())
        with Ops() as ops:
            model(torch.ones(1, WIDTH)).sum().backward()
            optimizer.step()
        counts.append(ops.ops)
    counts[1].subtract(counts[0])
    assert {name: n for name, n in counts[1].items() if n} == {"_foreach_norm": 1, "_local_scalar_dense": 2}
