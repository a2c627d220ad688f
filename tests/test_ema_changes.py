"""ModelEMA while a model, its types or its buffers change around it, and after errors and copies."""

import copy
import io

import pytest
import torch
from torch import nn

import anybatch


def shifted(model, decay=0.5, **options):
    """An average that is not the model's own weights."""
    ema = anybatch.ModelEMA(model, decay, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update()
    return ema


def own(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Rebinding(nn.Module):
    """Its forward puts another tensor in the place of a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("n", torch.tensor(1.0))

    def forward(self):
        self.n = self.n + self.weight.detach().sum()
        return self.n


# ---- inference mode


@pytest.mark.parametrize("change", ["bfloat16", "double", "made inside"])
def test_trap_inference_mode_leaves_nothing_that_an_update_cannot_write(change):
    model = nn.Linear(2, 2).to(torch.bfloat16 if change == "bfloat16" else torch.float32)
    with torch.inference_mode(change == "made inside"):
        ema = anybatch.ModelEMA(model, 0.5)
    if change == "double":
        ema.update()
        model.double()
    state = own(model)
    with torch.inference_mode(), ema.applied():
        pass
    ema.update()
    assert same(model, state)


def test_buffers_that_a_forward_makes_in_inference_mode():
    model = Rebinding()
    ema = shifted(model)
    with ema.applied():
        with torch.inference_mode():
            inside = float(model())
        with ema.withdrawn():
            assert float(model.n) == 1.0
        assert float(model.n) == inside
    assert float(model.n) == 1.0


# ---- the model's own weights come back


@pytest.mark.parametrize("how", ["half", "assign", "data", "double", "to"])
def test_trap_own_weights_come_back_into_what_the_body_made_of_the_model(how):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema, state = shifted(model), own(model)
    with ema.applied():
        if how == "assign":
            model.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()}, assign=True)
        elif how == "data":
            model[0].weight.data = torch.zeros(2, 3)
        else:
            {"half": model.half, "double": model.double, "to": lambda: model.to(torch.bfloat16)}[how]()
        dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert {name: value.dtype for name, value in model.state_dict().items()} == dtypes
    assert same(model, {name: value.to(dtypes[name]) for name, value in state.items()})
    ema.update()


def test_own_weights_without_a_place_are_an_error_and_the_others_come_back():
    model = nn.Linear(2, 2)
    ema, state = shifted(model), own(model)
    with pytest.raises(anybatch.UsageError, match=r"\['weight'\] changed inside"), ema.applied():
        model.weight = nn.Parameter(torch.zeros(1, 2))
    assert torch.equal(model.bias, state["bias"])


@pytest.mark.parametrize("shape", [(4, 3), (1, 1), (4, 1, 3)])
def test_expanded_buffers_and_those_after_them(shape):
    model = nn.Linear(2, 2)
    base = torch.tensor([float("nan"), 1.0, 2.0])[: shape[-1]].clone()
    model.register_buffer("mask", base.expand(shape))
    model.register_buffer("later", torch.zeros(1))
    ema, weight = shifted(model), model.weight.detach().clone()
    with ema.applied():
        base[-1:] = 7.0  # all that can change it
        model.later.add_(1)
    assert model.later == 0
    assert torch.equal(model.weight, weight)
    assert model.mask.shape == shape
    assert not (model.mask == 7).any()


def test_trap_withdrawn_shows_the_buffers_that_the_model_had():
    model = Rebinding()
    ema, state = shifted(model), own(model)
    kept = model.n
    with ema.applied():
        inside = float(model())
        with ema.withdrawn():
            assert model.n is kept
            assert same(model, state)
        assert float(model.n) == inside != 1.0
    assert model.n is kept
    assert same(model, state)


# ---- another model


@pytest.mark.parametrize("how", ["replaced", "added", "untied", "tied"])
def test_trap_a_model_with_other_parameters_is_an_error(how):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if how == "untied":
        model[1].weight = model[0].weight
    ema = anybatch.ModelEMA(model, 0.5)
    if how == "replaced":
        model[1] = nn.Linear(3, 3)
    elif how == "added":
        model.append(nn.Linear(3, 3))
    elif how == "untied":
        model[1].weight = nn.Parameter(torch.zeros(3, 3))
    else:
        model[1].weight = model[0].weight
    match = r"2\.weight" if how == "added" else r"1\.weight"
    with pytest.raises(anybatch.UsageError, match=match), ema.applied():
        pass
    with pytest.raises(anybatch.UsageError, match=match):
        ema.state_dict()


def test_parameters_that_are_left_out_may_come_and_go():
    model = nn.Sequential(nn.Linear(3, 3))
    ema = anybatch.ModelEMA(model, 0.5, include=lambda name: name.startswith("0."))
    model.append(nn.Linear(3, 3))
    with ema.applied():
        pass
    assert set(ema.state_dict()["averages"]) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_averaged(dtype):
    torch.manual_seed(0)
    model = nn.Module()
    model.real, model.spectrum = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.randn(3, dtype=dtype))
    ema = anybatch.ModelEMA(model, (0.5, 0.75))
    plain = model.spectrum.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.spectrum.copy_(torch.randn(3, dtype=dtype))
        ema.update(2)
        plain = 0.25 * plain + 0.75 * model.spectrum.detach()
    state = own(model)
    with ema.applied(0.5):
        torch.testing.assert_close(model.spectrum.detach(), plain)
    assert same(model, state)


# ---- numbers, errors and copies


def test_numbers_of_other_kinds_are_plain_floats():
    np = pytest.importorskip("numpy")
    model = nn.Linear(2, 2)
    ema = anybatch.ModelEMA(model, np.float64(0.9), update_every=2)
    ema.update(np.float64(2))
    ema.update(torch.tensor(3.0))
    ema.update(np.float32(1))
    assert [type(number) for number in (ema.decay, ema.tau, ema.state_dict()["pending"])] == [float] * 3
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    fresh = anybatch.ModelEMA(model, 0.9, update_every=2)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.tau == 5
    assert anybatch.ModelEMA(model, [np.float64(0.5), 0.9]).state_dict()["decay"] == [0.5, 0.9]


@pytest.mark.parametrize("every", [1, 2])
def test_an_update_that_failed_has_not_happened(every):
    model = nn.Linear(2, 2)
    ema = anybatch.ModelEMA(model, 0.5, update_every=every)
    for _ in range(every - 1):
        ema.update(1.0)
    bias, model.bias = model.bias, None
    with pytest.raises(anybatch.UsageError):
        ema.update(3.0)
    model.bias = bias
    ema.update(3.0)
    assert ema.tau == every - 1 + 3.0


def test_a_copy_follows_no_clock_and_stops_nothing():
    clock, model = anybatch.Clock(), nn.Linear(2, 2).bfloat16()
    ema = shifted(model, clock=clock)
    twin = copy.deepcopy(ema)
    twin.stop()
    clock.advance(2.0)
    assert (ema.tau, twin.tau) == (3.0, 1.0)
    twin.update(2.0)  # with its own copy of the model
    for mine, theirs in zip(ema.state_dict()["averages"].values(), twin.state_dict()["averages"].values(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    ema.stop()
    clock.advance(1.0)
    assert ema.tau == 3.0
