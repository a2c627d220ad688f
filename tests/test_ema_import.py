"""Averages of other libraries: torch's own object, and states in the very form of the others.

The forms were taken from timm 1.0.31, ema-pytorch 0.8.3, diffusers 0.42.1 and torch-ema 0.3.
"""

import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anybatch


class Model(nn.Module):
    """Tied weights, a frozen parameter, batch norm, and a module named as wrappers are."""

    def __init__(self, width=4):
        super().__init__()
        self.module = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.module.weight
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    model = Model(**options)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
        model.norm.running_mean.normal_()
    return model


def named(model, prefix):
    return {prefix + name: value.clone() for name, value in model.state_dict().items()}


def listed(model, *, trained=False):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad or not trained]


def ema_pytorch(model):
    online, average = named(model_of(9), "online_model."), named(model, "ema_model.")
    return {"initted": torch.tensor(True), "step": torch.tensor(7), **online, **average}


def diffusers(model):
    return {
        "decay": 0.999, "min_decay": 0.0, "optimization_step": 7, "update_after_step": 0, "use_ema_warmup": False,
        "inv_gamma": 1.0, "power": 2 / 3, "shadow_params": listed(model),
    }  # fmt: skip


def torch_ema(model, **options):
    return {"decay": 0.999, "num_updates": 7, "shadow_params": listed(model, **options), "collected_params": None}


STATES = {
    "AveragedModel": lambda m: {"n_averaged": torch.tensor(7), **named(m, "module.")},
    "AveragedModel of DDP": lambda m: {"n_averaged": torch.tensor(7), **named(m, "module.module.")},
    "AveragedModel, compiled": lambda m: {"n_averaged": torch.tensor(7), **named(m, "module._orig_mod.")},
    "ema-pytorch": ema_pytorch,
    "diffusers": diffusers,
    "torch_ema": torch_ema,
    "torch_ema, trained": lambda m: torch_ema(m, trained=True),
    "timm": lambda m: named(m, "module."),
    "a model": lambda m: named(m, ""),
}
UNCOUNTED = ("timm", "a model")


@pytest.mark.parametrize("form", STATES)
def test_every_form_is_read(form):
    theirs, model = model_of(1), model_of(2)
    include = (lambda name: name != "frozen") if "trained" in form else (lambda name: True)
    ema = anybatch.ModelEMA(model, 0.9, include=include)
    file = io.BytesIO()
    torch.save(STATES[form](theirs), file)
    file.seek(0)
    state = anybatch.ema_state_from(torch.load(file, weights_only=True), ema=ema)
    ema.load_state_dict(state)
    with ema.applied():
        for (name, mine), expected in zip(model.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, expected) == include(name), name
    assert ema.tau == (float("inf") if form in UNCOUNTED else 7)
    assert ema.state_dict()["decay"] == 0.9


@pytest.mark.parametrize("form", ["AveragedModel", "timm", "ema-pytorch", "a model"])
def test_running_statistics_where_they_are_averaged(form):
    theirs, model = model_of(1), model_of(2)
    ema = anybatch.ModelEMA(model, 0.9, average_statistics=True)
    ema.load_state_dict(anybatch.ema_state_from(STATES[form](theirs), ema=ema))
    assert torch.equal(ema.state_dict()["averages"]["norm.running_mean"], theirs.norm.running_mean)
    with pytest.raises(anybatch.StateError, match=r"norm\.running_mean.*include"):
        anybatch.ema_state_from(diffusers(theirs), ema=ema)


@pytest.mark.parametrize("counter", ["n_averaged", "step", "optimization_step", "num_updates"])
def test_a_counter_beside_the_models_own_names_counts(counter):
    model = model_of(2)
    ema = anybatch.ModelEMA(model, 0.9)
    assert anybatch.ema_state_from({counter: torch.tensor(7), **named(model_of(1), "")}, ema=ema)["tau"] == 7


def test_a_run_goes_on_from_torchs_average():
    """Half of a run with AveragedModel, half with ModelEMA: what AveragedModel gives alone."""
    decay = 0.9
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    whole = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    ema = None
    for step in range(8):
        torch.manual_seed(step)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        whole.update_parameters(model)
        if step == 3:
            ema = anybatch.ModelEMA(model, decay)
            ema.load_state_dict(anybatch.ema_state_from(whole.state_dict(), ema=ema))
        elif ema is not None:
            ema.update()
    for mine, theirs in zip(ema.state_dict()["averages"].values(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-14)
    assert ema.tau == whole.n_averaged == 8


@pytest.mark.parametrize("form", STATES)
def test_the_state_of_another_model_is_refused(form):
    ema = anybatch.ModelEMA(model_of(), 0.9)
    kept = [a.clone() for a in ema.state_dict()["averages"].values()]
    other = model_of(width=3)
    with pytest.raises(anybatch.StateError):
        ema.load_state_dict(anybatch.ema_state_from(STATES[form](other), ema=ema))
    larger = model_of()
    larger.more = nn.Linear(2, 2)
    with pytest.raises(anybatch.StateError, match="another model"):
        anybatch.ema_state_from(STATES[form](larger), ema=ema)
    assert all(map(torch.equal, kept, ema.state_dict()["averages"].values()))


def test_a_count_that_was_not_kept():
    """torch_ema writes `None` with use_num_updates=False."""
    model = model_of()
    ema = anybatch.ModelEMA(model, 0.9)
    assert anybatch.ema_state_from({**torch_ema(model), "num_updates": None}, ema=ema)["tau"] == float("inf")


@pytest.mark.parametrize(("prefix", "tau"), [("", float("inf")), ("module.", 7)])
def test_a_parameter_that_is_called_like_a_counter(prefix, tau):
    model = nn.Linear(2, 2)
    model.step = nn.Parameter(torch.tensor(0.25))
    ema = anybatch.ModelEMA(model, 0.9)
    counter = {"n_averaged": torch.tensor(7)} if prefix else {}
    state = anybatch.ema_state_from({**counter, **named(model, prefix)}, ema=ema)
    assert torch.equal(state["averages"]["step"], torch.tensor(0.25))
    assert state["tau"] == tau


def test_what_is_no_state_is_refused():
    model = model_of()
    ema = anybatch.ModelEMA(model, 0.9)
    with pytest.raises(anybatch.StateError, match="AveragedModel, timm"):
        anybatch.ema_state_from({"weight": torch.zeros(2)}, ema=ema)
    with pytest.raises(anybatch.StateError, match="state_dict"):
        anybatch.ema_state_from(AveragedModel(nn.Linear(2, 2)), ema=ema)
    with pytest.raises(anybatch.InvalidValueError, match="one decay"):
        anybatch.ema_state_from(named(model, ""), ema=anybatch.ModelEMA(model, (0.9, 0.99)))
    with pytest.raises(anybatch.StateError, match="ema_state_from"):
        ema.load_state_dict(named(model, "module."))
