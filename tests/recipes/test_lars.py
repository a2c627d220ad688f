"""LARS, from pytorch-optimizer: that it is what recipes/ema/optimizers.py takes it for, and the law of its exponent."""

from dataclasses import replace

import pytest
import torch
from pytorch_optimizer import LARS
from torch import nn

import anybatch
from recipes.ema import byol, lars, train
from recipes.ema.optimizers import make_optimizer


def test_it_normalises_each_matrix_before_the_momentum_and_leaves_vectors_to_sgd():
    """The loop of You et al. 2017, Algorithm 1, in float64, with the rate outside of the buffer as BYOL has it."""
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(4, 3).double()), nn.Parameter(torch.randn(3).double())
    config = replace(lars.CONFIGS["small"], rate=0.3, momentum=0.9, weight_decay=0.01, trust=0.02)
    optimizer = make_optimizer(nn.ParameterList([matrix, vector]), config)
    weights = [matrix.detach().clone(), vector.detach().clone()]
    buffers = [torch.zeros(4, 3).double(), torch.zeros(3).double()]
    for _ in range(5):
        gradients = [torch.randn(4, 3).double(), torch.randn(3).double()]
        matrix.grad, vector.grad = (g.clone() for g in gradients)
        optimizer.step()
        norm, size = gradients[0].square().sum().sqrt(), weights[0].square().sum().sqrt()
        local = 0.02 * size / (norm + 0.01 * size)
        moves = [local * (gradients[0] + 0.01 * weights[0]), gradients[1]]
        for w, buffer, move in zip(weights, buffers, moves, strict=True):
            buffer.mul_(0.9).add_(move)
            w.sub_(0.3 * buffer)
    torch.testing.assert_close([matrix.detach(), vector.detach()], weights, rtol=1e-12, atol=1e-12)


class Pushed(nn.Module):
    """A loss whose gradient is whatever comes in; weights so large that steps hardly change their norm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((40, 100), 10.0))

    def forward(self, push):
        return (self.weight * push).sum()


def drift(rule, size, *, mean, base=1000):
    """How far base batches whose gradients are `mean` under noise of 1 bring the weights in a base iteration."""
    model, noise = Pushed(), torch.Generator().manual_seed(0)
    optimizer = LARS(model.parameters(), lr=0.01, momentum=0.5, trust_coefficient=1e-2)
    controller = anybatch.attach(optimizer, model=model, rule=rule, scale="count", total=base)
    while not controller.done:
        for _ in range(size):
            (model(mean + torch.randn(40, 100, generator=noise)) / size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(10 - model.weight.detach().mean()) / controller.tau


@pytest.mark.parametrize(("mean", "base"), [(0.02, 1000), (0.2, 200), (1.0, 200)])
def test_law_with_exponent_one_half_it_goes_as_far_as_the_gain_says_whatever_the_noise(mean, base):
    bare = drift(anybatch.Identity(), 1, mean=mean, base=base)
    assert drift(anybatch.AdaScale(exponent=0.5), 8, mean=mean, base=base) == pytest.approx(bare, rel=0.03)
    assert drift(anybatch.AdaScale(exponent=1.0), 8, mean=mean, base=base) > 1.3 * bare


def test_the_fixed_rule_is_the_square_root_where_noise_dominates():
    bare = drift(anybatch.Identity(), 1, mean=0.02)
    assert drift(anybatch.SquareRoot(), 8, mean=0.02) == pytest.approx(bare, rel=0.03)
    assert drift(anybatch.Linear(), 8, mean=0.02) > 2 * bare


def test_attach_does_not_guess_what_lars_is():
    model = Pushed()
    optimizer = LARS(model.parameters(), lr=0.1)
    with pytest.raises(anybatch.UnsupportedError, match=r"rate of LARS .* not known"):
        anybatch.attach(optimizer, model=model, scale="count", total=10)
    controller = anybatch.attach(optimizer, model=model, rule=anybatch.AdaScale(exponent=0.5), scale="count", total=10)
    controller.detach()


@pytest.mark.parametrize("arm", ["rule", "off", "adascale", "linear"])
def test_byol_under_lars(arm):
    config = replace(lars.CONFIGS["small"], total=16, evaluations=2, points=2)
    found = train.train(byol.Digits(config), arm, scale=4, seed=0)
    assert found["steps"] >= 4
    assert all(0 <= value <= 100 for value in found["teacher_accuracy"])
