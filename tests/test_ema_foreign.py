"""Averages of other libraries beside a training: each kind is named once, and those of other models are not."""

import copy
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anybatch
from anybatch._ema.foreign import foreign_average_of, warn_of_foreign_average


def model_of(seed=0, width=6):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 2, bias=False))
    model[1].bias.requires_grad_(False)
    return model


class Part(nn.Module):
    """A module around a model, as Lightning's are; its own parameters come first."""

    def __init__(self, inner):
        super().__init__()
        self.extra = nn.Parameter(torch.randn(3))
        self.inner = inner


def copied(model):
    return copy.deepcopy(model)


def listed(parameters):
    return [p.detach().clone() for p in parameters]


# Module and name of the class, the attribute that holds the average, and what it holds.
CLASSES = [
    ("timm.utils.model_ema", "ModelEma", "ema", copied),
    ("timm.utils.model_ema", "ModelEmaV2", "module", copied),
    ("timm.utils.model_ema", "ModelEmaV3", "module", copied),
    ("ema_pytorch.ema_pytorch", "EMA", "ema_model", copied),
    ("ema_pytorch.post_hoc_ema", "KarrasEMA", "ema_model", copied),
    ("diffusers.training_utils", "EMAModel", "shadow_params", lambda model: listed(model.parameters())),
    ("torch_ema.ema", "ExponentialMovingAverage", "shadow_params",
     lambda model: listed(p for p in model.parameters() if p.requires_grad)),
    ("pytorch_lightning.callbacks.weight_averaging", "WeightAveraging", "_average_model", AveragedModel),
]  # fmt: skip


@pytest.mark.parametrize(("where", "name", "attribute", "make"), CLASSES)
@pytest.mark.parametrize("subclass", [False, True])
def test_each_class_is_recognised_by_where_it_is_defined(monkeypatch, where, name, attribute, make, subclass):
    kind = type(name, (nn.Module if make is copied else object,), {"__module__": where})
    monkeypatch.setitem(sys.modules, where, types.SimpleNamespace(**{name: kind}))
    used = type("Mine", (kind,), {}) if subclass else kind
    theirs, model = used(), model_of()
    assert foreign_average_of(model) is None
    setattr(theirs, attribute, None)  # not made yet, as with ema-pytorch's lazy_init_ema
    assert foreign_average_of(model) is None
    setattr(theirs, attribute, make(model_of(seed=1)))
    assert foreign_average_of(model) is None  # another model of the same shapes
    setattr(theirs, attribute, make(model_of(width=5)))
    assert foreign_average_of(model) is None
    setattr(theirs, attribute, make(model))
    assert foreign_average_of(model) == ("Mine" if subclass else name)
    monkeypatch.setitem(sys.modules, where, types.SimpleNamespace(**{name: type(name, (), {})}))
    found = foreign_average_of(model)  # a class of this name, but not this class
    assert found is None or make is AveragedModel


def test_lightnings_callback_is_named_and_not_what_it_holds():
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    callback, model = callbacks.EMAWeightAveraging(decay=0.99), model_of()
    callback._average_model = AveragedModel(model)
    assert foreign_average_of(model) == "EMAWeightAveraging"


@pytest.mark.parametrize("steps", [0, 1, 300])
def test_an_average_is_found_at_any_time_of_a_training(steps):
    model, rows = model_of(), torch.randn(32, 6)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        nn.functional.mse_loss(model(rows), rows[:, :2]).backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.update_parameters(model)
    assert foreign_average_of(model) == "AveragedModel"


def test_a_part_and_a_whole():
    """attach got the network and Lightning averages its module; or attach got both, and one is averaged."""
    inner = model_of()
    whole = Part(inner)
    theirs = AveragedModel(whole)
    assert foreign_average_of(inner) == "AveragedModel"
    del theirs
    theirs = AveragedModel(inner)
    assert foreign_average_of(whole) == "AveragedModel"
    assert theirs.n_averaged == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_an_average_of_another_type(dtype):
    model = nn.Linear(20, 20, dtype=dtype)
    with torch.no_grad():
        model.weight.normal_()
    theirs = AveragedModel(model)
    theirs.module.weight = nn.Parameter(theirs.module.weight.detach().to(torch.promote_types(dtype, torch.float32)))
    assert foreign_average_of(model) == "AveragedModel"
    with torch.no_grad():
        theirs.module.weight.normal_()
    assert foreign_average_of(model) is None


def test_the_warning_names_the_class_and_both_ways_out():
    model = model_of()
    theirs = AveragedModel(model)
    with pytest.warns(anybatch.AnybatchWarning) as said:
        warn_of_foreign_average(model)
    assert len(said) == 1
    text = str(said[0].message)
    silence = 'warnings.filterwarnings("ignore", "AveragedModel", anybatch.AnybatchWarning)'
    way_out = "anybatch.ModelEMA(model, decay=..., clock=controller.clock)"
    for part in ("AveragedModel averages this model", way_out, "once an epoch", silence):
        assert part in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(text[text.index("warnings.filterwarnings") :].rstrip("."), {"warnings": warnings, "anybatch": anybatch})
        warn_of_foreign_average(model)  # which the text's own line has silenced
    assert theirs.n_averaged == 0


def test_no_alarm_without_one():
    model = model_of()
    theirs = AveragedModel(model_of(seed=1))
    mine = anybatch.ModelEMA(model, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_foreign_average(model)
        del theirs
        theirs = AveragedModel(model)
        del theirs  # none is alive
        warn_of_foreign_average(model)
    assert mine.tau == 0


def test_no_library_is_imported():
    code = (
        "import sys, torch\nfrom anybatch._ema.foreign import foreign_average_of\n"
        "assert foreign_average_of(torch.nn.Linear(2, 2)) is None\n"
        "assert not {'timm', 'ema_pytorch', 'diffusers', 'torch_ema', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("scale", "said"), [(None, 1), (1, 0)])
def test_a_controlled_run_warns_at_its_first_step_alone(scale, said):
    model = nn.Linear(4, 2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes = {"base_batch": 4, "micro_batch": 4} if scale is None else {"scale": scale}
    anybatch.attach(optimizer, model=model, **sizes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for x in torch.randn(2, 4, 4):
                (model(x).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
    assert sum("AveragedModel averages this model" in str(each.message) for each in caught) == said
