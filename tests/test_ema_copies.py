"""Copies of a ModelEMA, in this process and in another, go on as the original does."""

import copy
import pickle

import pytest
import torch
from torch import nn

import anybatch


class Net(nn.Module):
    """Tied weights, a recurrent layer that keeps lists of its weights, and statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.recurrent = nn.LSTM(3, 2)
        self.norm = nn.BatchNorm1d(2)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def move(ema, model, steps):
    """The same weights at the same steps, whoever has them."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        ema.update(1.5)


def alike(a, b):
    return all(torch.equal(x, y) for x, y in zip(a["averages"].values(), b["averages"].values(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    ("decay", "options"),
    [(0.9, {}), (0.9, {"update_every": 2, "warmup": True}), (0.9, {"average_statistics": True, "device": "cpu"}),
     (anybatch.cosine_decay(0.5, total=20), {}), ((0.9, 0.99), {})],
)  # fmt: skip
def test_a_copy_goes_on_as_the_original(copied, decay, options):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale=2, rule=anybatch.Linear())
    ema = anybatch.ModelEMA(model, decay, clock=controller.clock, **options)
    move(ema, model, range(3))
    twin_model, twin = copied((model, ema))
    assert twin_model is not model
    before = copy.deepcopy(ema.state_dict())
    move(twin, twin_model, range(3, 6))  # the same model's average, still
    assert alike(ema.state_dict(), before)
    assert not alike(twin.state_dict(), before)
    move(ema, model, range(3, 6))
    for key, value in ema.state_dict().items():
        if not key.startswith("averages"):
            assert twin.state_dict()[key] == value
    assert alike(twin.state_dict(), ema.state_dict())
    with twin.applied(0.9 if isinstance(decay, tuple) else None):
        average = twin._averages[0][0]
        assert torch.equal(twin_model.first.weight.detach(), average)
        assert twin_model.second.weight is twin_model.first.weight
    controller.clock.advance(1.0)  # which the original alone follows
    assert ema.state_dict()["tau"] + ema.state_dict()["pending"] == 10
    assert twin.state_dict()["tau"] + twin.state_dict()["pending"] == 9
    controller.detach()


def test_functions_that_have_no_name_can_be_copied_and_not_pickled():
    model = nn.Linear(2, 2)
    for ema in (
        anybatch.ModelEMA(model, 0.9, include=lambda name: name == "weight"),
        anybatch.ModelEMA(model, lambda tau: 0.5),
    ):
        assert alike(copy.deepcopy(ema).state_dict(), ema.state_dict())
        with pytest.raises(anybatch.UsageError, match=r"lambda.*state_dict\(\)"):
            pickle.dumps(ema)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, copy.copy])
def test_inside_of_applied_there_is_no_copy(copied):
    model = nn.Linear(2, 2)
    ema = anybatch.ModelEMA(model, 0.9)
    with ema.applied():
        with pytest.raises(anybatch.UsageError, match=r"applied\(\).*withdrawn\(\)"):
            copied(ema)
        with ema.withdrawn():
            assert alike(copied(ema).state_dict(), ema.state_dict())
