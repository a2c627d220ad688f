"""Averages of other libraries: torch's own object, and states in the very form of the others.

The forms were taken from timm 1.0.31, ema-pytorch 0.8.3, diffusers 0.42.1 and torch-ema 0.3. To ema-pytorch's its
`update_every` is added, which the state does not hold.
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
    return {"initted": torch.tensor(True), "step": torch.tensor(7), "update_every": 1, **online, **average}


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


# ---- averages that moved once in several base iterations ----


def moved_rarely(decay, every, steps, form):
    """A random walk and its average, as a plain loop: the state of `form`, the walk's end and what the average is."""
    torch.manual_seed(3)
    model = nn.Linear(3, 2).double()
    average = [p.detach().clone() for p in model.parameters()]
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        if (step + 1) % every == 0:
            average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
    names = [name for name, _ in model.named_parameters()]
    by_name = dict(zip(names, average, strict=True))
    updates = steps // every
    states = {
        "ema-pytorch": {"initted": torch.tensor(True), "step": torch.tensor(steps), "beta": decay,
                        **{f"ema_model.{name}": value for name, value in by_name.items()}},
        "diffusers": {"decay": decay, "optimization_step": updates, "shadow_params": average},
        "torch_ema": {"decay": decay, "num_updates": updates, "shadow_params": average},
        "AveragedModel": {"n_averaged": torch.tensor(updates), "decay": decay,
                          **{f"module.{name}": value for name, value in by_name.items()}},
    }  # fmt: skip
    return states[form], model, average


@pytest.mark.parametrize("form", ["ema-pytorch", "diffusers", "torch_ema", "AveragedModel"])
@pytest.mark.parametrize("said", ["argument", "state"])
@pytest.mark.parametrize(("decay", "every"), [(0.9, 10), (0.5, 3), (0.9999, 10)])
def test_a_decay_per_update_becomes_one_per_base_iteration(form, said, decay, every):
    """The weights stay: after `every` more base iterations theirs keeps `decay`, in one update, and so does ours."""
    state, model, average = moved_rarely(decay, every, 6 * every, form)
    how = {"update_every": every}
    ema = anybatch.ModelEMA(model, decay ** (1 / every))
    if said == "argument":
        ema.load_state_dict(anybatch.ema_state_from(state, ema=ema, **how))
    else:
        ema.load_state_dict(anybatch.ema_state_from({**state, **how}, ema=ema))
    assert ema.tau == 6 * every
    for _ in range(every):
        ema.update()
    expected = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
    for mine, theirs in zip(ema.state_dict()["averages"].values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["ema-pytorch", "diffusers", "torch_ema", "AveragedModel"])
@pytest.mark.parametrize("wrong", [0.9, 0.9 ** (1 / 5), 0.9**10, 0.0])
def test_a_decay_that_is_not_per_base_iteration_is_refused_with_the_right_one(form, wrong):
    state, model, _ = moved_rarely(0.9, 10, 20, form)
    with pytest.raises(anybatch.InvalidValueError, match=r"decay=0\.9 \*\* \(1 / 10\)") as raised:
        anybatch.ema_state_from(state, ema=anybatch.ModelEMA(model, wrong), update_every=10)
    assert repr(0.9**0.1) in str(raised.value)


def test_a_state_that_does_not_say_how_often_is_refused():
    state, model, _ = moved_rarely(0.9, 10, 20, "ema-pytorch")
    ema = anybatch.ModelEMA(model, 0.9**0.1)
    with pytest.raises(anybatch.InvalidValueError, match=r"10 by default.*beta \*\* \(1 / update_every\)"):
        anybatch.ema_state_from(state, ema=ema)
    del state["beta"]
    with pytest.raises(anybatch.InvalidValueError, match=r"decay per update is needed.*beta"):
        anybatch.ema_state_from(state, ema=ema, update_every=10)
    assert anybatch.ema_state_from(state, ema=ema, update_every=1)["tau"] == 20
    for wrong in (0, -1, 2.5, "10", True):
        with pytest.raises(anybatch.InvalidValueError, match="update_every"):
            anybatch.ema_state_from(state, ema=ema, update_every=wrong)


def test_a_function_of_the_clock_is_the_same_however_often_it_is_asked():
    state, model, _ = moved_rarely(0.9, 10, 20, "ema-pytorch")
    ema = anybatch.ModelEMA(model, anybatch.cosine_decay(0.9, total=100))
    assert anybatch.ema_state_from(state, ema=ema, update_every=10)["tau"] == 20


@pytest.mark.parametrize("name", ["update_every", "beta", "decay", "initted"])
def test_a_parameter_that_is_called_like_a_setting(name):
    model = nn.Linear(2, 2)
    setattr(model, name, nn.Parameter(torch.tensor(0.25)))
    ema = anybatch.ModelEMA(model, 0.9)
    state = anybatch.ema_state_from(named(model, ""), ema=ema)
    assert torch.equal(state["averages"][name], torch.tensor(0.25))
