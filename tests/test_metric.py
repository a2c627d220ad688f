"""AdaScale(metric="adam"): the gain in Adam's own metric, against plain loops in float64."""

import io
import math

import common
import oracle
import pytest
import torch
from metric_oracle import BETAS, DECAY, EPS, LR, READY, gain_of, moments_of, plain_loop
from torch import nn

import anybatch
from anybatch._gradients import adam_metric


@pytest.fixture(autouse=True)
def _float64():
    """Adam counts its steps in the default type: in float64 the plain loops agree to rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def adam(make=torch.optim.AdamW, model=None, **options):
    model = oracle.make_model() if model is None else model
    return model, make([p for p in model.parameters() if p.requires_grad], lr=LR, betas=BETAS, eps=EPS, **options)


def attach(optimizer, model, *, metric="adam", total=100.0, rule=None, **options):
    lines = []
    rule = {"metric": metric, **(rule or {})}
    options = {"scale": "count", "total": total, **options}
    controller = anybatch.attach(optimizer, model=model, rule=anybatch.AdaScale(**rule), record=lines.append, **options)
    return controller, lines


def backward(model, t, n, *, factor=1.0, loss=oracle.loss_fn):
    for i in range(n):
        x, y = oracle.micro_batch(t, i)
        dtype = next(model.parameters()).dtype
        (loss(model(x.to(dtype)), y) * (factor / n)).backward()


def train(model, optimizer, controller, steps, *, start=0, counts=(4,)):
    gains = []
    for t in range(start, start + steps):
        backward(model, t, counts[t % len(counts)])
        optimizer.step()
        optimizer.zero_grad()
        gains.append(controller.gain)
    return gains


@pytest.mark.parametrize("counts", [(4,), (2, 7, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}], ids=str)
def test_agrees_with_the_plain_loop(options, counts):
    expected, weights = plain_loop(steps=30, counts=counts, amsgrad=options.get("amsgrad", False))
    model, optimizer = adam(weight_decay=DECAY, **options)
    controller, lines = attach(optimizer, model)
    gains = train(model, optimizer, controller, 30, counts=counts)
    rel = 1e-6 if "fused" in options else 1e-9  # it counts its steps in float32 always
    assert gains == pytest.approx([r for r, *_ in expected], rel=rel)
    for line, (variance, sqnorm, *euclidean) in zip(lines, (e[1:] for e in expected), strict=True):
        mine = [line.get(f"anybatch/metric_{name}", math.nan) for name in ("variance", "sqnorm")]
        assert mine == pytest.approx([variance, max(sqnorm, 0)], rel=rel, nan_ok=True)
        mine = [line[f"anybatch/{name}"] for name in ("variance", "sqnorm")]
        assert mine == pytest.approx([max(x, 0) for x in euclidean], rel=rel)
    for p, w in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p, w, rtol=10 * rel, atol=rel)


def test_the_metric_alters_the_gain_from_the_eleventh_step_on():
    gains = []
    for metric in ("adam", "euclidean"):
        model, optimizer = adam()
        controller, _ = attach(optimizer, model, metric=metric, rule={"noise_factor": 1.0})
        gains.append(train(model, optimizer, controller, READY + 3))
    assert gains[0][:READY] == gains[1][:READY]
    assert gains[0][READY] != pytest.approx(gains[1][READY], rel=1e-3)


def weights_of(optimizer):
    """Adam's weights before a step, by the state that it keeps."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            v = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
            v = (torch.view_as_real(v) if v.is_complex() else v).double()
            found.append(1 / ((v / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]))
    return found


def one_window(model, optimizer, lines, *, n=4, t=50, loss=oracle.loss_fn):
    """The moments of one more step by hand, and those in the record (of averages without a memory)."""
    weight, grads = weights_of(optimizer), []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i in range(n):
        x, y = oracle.micro_batch(t, i)
        found = torch.autograd.grad(loss(model(x.to(next(model.parameters()).dtype)), y), parameters)
        grads.append([(torch.view_as_real(g) if g.is_complex() else g).double() for g in found])
    backward(model, t, n, loss=loss)
    optimizer.step()
    optimizer.zero_grad()
    return moments_of(grads, weight, 1.0), [lines[-1].get(f"anybatch/metric_{x}") for x in ("variance", "sqnorm")]


@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam"])
@pytest.mark.parametrize("decays", ["clock", "constant", 0.5])
def test_the_family(name, decays):
    model, optimizer = adam(getattr(torch.optim, name))
    controller, lines = attach(optimizer, model, rule={"smoothing": 0.0, "decays": decays}, total=None)
    train(model, optimizer, controller, READY + 2, counts=(2,))
    expected, mine = one_window(model, optimizer, lines)
    assert mine == pytest.approx([expected[0], max(expected[1], 0)], rel=1e-9)
    assert controller.gain == pytest.approx(gain_of(*expected, 4, READY + 3), rel=1e-9)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex128))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return (x.to(torch.complex128) @ self.weight).abs() + self.bias


def test_complex_parameters_and_groups_of_their_own():
    model = Complex()
    groups = [{"params": [model.weight], "eps": 1e-3}, {"params": [model.bias], "betas": (0.8, 0.9)}]
    optimizer = torch.optim.Adam(groups, lr=LR)
    controller, lines = attach(optimizer, model, rule={"smoothing": 0.0})
    train(model, optimizer, controller, READY + 1)
    expected, mine = one_window(model, optimizer, lines)
    assert mine == pytest.approx([expected[0], max(expected[1], 0)], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_low_precision(dtype):
    model, optimizer = adam(model=oracle.make_model(dtype=dtype))
    controller, lines = attach(optimizer, model, rule={"smoothing": 0.0})
    train(model, optimizer, controller, READY + 1)
    expected, mine = one_window(model, optimizer, lines)
    # In bfloat16 .grad itself, a sum of rounded gradients, is 0.4 % off.
    assert mine[0] == pytest.approx(expected[0], rel=1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("on_device", [False, True])
def test_counts_of_steps_that_differ(monkeypatch, on_device):
    """Each parameter has a debiasing of its own; where its count is on a device, by a tensor that is not read."""
    monkeypatch.setattr(adam_metric, "_on_device", lambda _: on_device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3001), nn.Tanh(), nn.Linear(3001, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.999))
    controller, lines = attach(optimizer, model, rule={"smoothing": 0.0})
    for t in range(READY + 6):
        backward(model, t, 2)
        for p in [model[0].weight, model[2].bias] if t % 3 else []:
            p.grad = None  # a large and a small one
        optimizer.step()
        optimizer.zero_grad()
    assert len({float(state["step"]) for state in optimizer.state.values()}) > 1
    expected, mine = one_window(model, optimizer, lines)
    assert mine == pytest.approx([expected[0], max(expected[1], 0)], rel=1e-9)


def test_large_parameters():
    """Above the size at which norms are taken row by row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3001), nn.Tanh(), nn.Linear(3001, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    controller, lines = attach(optimizer, model, rule={"smoothing": 0.0})
    train(model, optimizer, controller, READY + 1, counts=(2,))
    expected, mine = one_window(model, optimizer, lines)
    assert mine == pytest.approx([expected[0], max(expected[1], 0)], rel=1e-9)


def test_scale_1_and_the_bounds():
    for sample, low, high in ((0.25, 1.0, 1.0), (1.0, 1.0, 4.0), (8.0, 1.0, 32.0), (0.125, 0.5, 1.0)):
        model, optimizer = adam()
        controller, _ = attach(optimizer, model, total=1000, scale=None, base_batch=4 / sample, micro_batch=4)
        gains = train(model, optimizer, controller, READY + 10)
        assert all(low <= gain <= high for gain in gains)
        assert len(set(gains)) == 1 or low < high


def test_one_gradient_a_step_keeps_the_last_gain_known():
    model, optimizer = adam()
    controller, _ = attach(optimizer, model, scale=4)
    train(model, optimizer, controller, READY + 3)
    last, state = controller.gain, controller.state_dict()
    with pytest.warns(anybatch.AnybatchWarning, match="shows no variance"):
        assert train(model, optimizer, controller, 1, start=30, counts=(1,)) == [last]
    assert controller.state_dict()["metric_variance"] == state["metric_variance"]


def test_an_unfrozen_parameter_waits_for_its_own_second_moment():
    model = oracle.make_model()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    controller, lines = attach(optimizer, model)
    train(model, optimizer, controller, READY + 2)
    model[0].bias.requires_grad_(True)
    train(model, optimizer, controller, READY + 2, start=20)
    known = ["anybatch/metric_variance" in line for line in lines]
    # The window that the hooks came too late for shows no moments at all, so the averages stay.
    assert known == [False] * READY + [True] * 3 + [False] * (READY - 1) + [True] * 2
    assert all(line["anybatch/gain"] >= 1 for line in lines)


def test_a_head_that_is_first_used_late_and_a_head_that_never_is():
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    controller, lines = attach(optimizer, model)
    for t in range(2 * READY + 4):
        for i in range(2):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(model[i if t > READY + 1 else 0](x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    known = ["anybatch/metric_variance" in line for line in lines]
    assert known == [False] * READY + [True] * 2 + [False] * READY + [True] * 2


def test_a_state_of_the_optimizer_that_is_gone_is_measured_anew():
    model, optimizer = adam()
    controller, lines = attach(optimizer, model)
    train(model, optimizer, controller, READY + 1)
    optimizer.state.clear()
    train(model, optimizer, controller, READY + 1, start=20)
    known = ["anybatch/metric_variance" in line for line in lines]
    assert known == [False] * READY + [True] + [False] * READY + [True]


def test_skipped_steps_leave_the_averages_alone():
    model, optimizer = adam()
    controller, lines = attach(optimizer, model)
    train(model, optimizer, controller, READY + 2)
    state = controller.state_dict()
    backward(model, 30, 4, factor=math.inf)
    optimizer.step()
    optimizer.zero_grad()
    assert controller.state_dict() == {**state, "skipped": 1}


def test_observe():
    found = []
    for observed in (False, True):
        model, optimizer = adam()
        controller, lines = attach(optimizer, model)
        for t in range(READY + 3):
            if observed:
                grads = []
                for i in range(4):
                    x, y = oracle.micro_batch(t, i)
                    grads.append(torch.autograd.grad(oracle.loss_fn(model(x), y), list(model.parameters())))
                controller.observe([torch.stack(each) for each in zip(*grads)])
            else:
                backward(model, t, 4)
            optimizer.step()
            optimizer.zero_grad()
        found.append([line[name] for line in lines[READY:] for name in ("anybatch/gain", "anybatch/metric_sqnorm")])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_loss_scales_and_sums_do_not_show():
    found = []
    for options, factor in (({}, 1.0), ({"grad_scaler": True}, 1.0), ({"reduction": "sum"}, 4.0)):
        model, optimizer = adam(fused=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if options.pop("grad_scaler", False) else None
        controller, lines = attach(optimizer, model, grad_scaler=scaler, **options)
        for t in range(READY + 3):
            for i in range(4):
                x, y = oracle.micro_batch(t, i)
                loss = oracle.loss_fn(model(x), y) / 4 * factor
                (loss if scaler is None else scaler.scale(loss)).backward()
            common.step(optimizer, scaler)
            optimizer.zero_grad()
        found.append([line[name] for line in lines[READY:] for name in ("anybatch/gain", "anybatch/metric_variance")])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("clip", [False, True])
def test_clipping_comes_after(clip):
    """Norms are of the gradients before the user's clipping; only Adam's own v sees it."""
    model, optimizer = adam()
    controller, lines = attach(optimizer, model, rule={"smoothing": 0.0})
    train(model, optimizer, controller, READY + 1)
    weight, grads = weights_of(optimizer), []
    for i in range(4):
        x, y = oracle.micro_batch(40, i)
        grads.append(torch.autograd.grad(oracle.loss_fn(model(x), y), list(model.parameters())))
    backward(model, 40, 4)
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert lines[-1]["anybatch/metric_variance"] == pytest.approx(moments_of(grads, weight, 1.0)[0], rel=1e-9)


# ---- state and record ----


def parts(metric="adam"):
    model, optimizer = adam()
    return {"model": model, "optimizer": optimizer, "controller": attach(optimizer, model, metric=metric)[0]}


def carry(old, new):
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in old.items()}, file)
    file.seek(0)
    for name, state in torch.load(file, weights_only=True).items():
        new[name].load_state_dict(state)
    return new


@pytest.mark.parametrize("at", [3, READY + 4])
def test_resuming_is_bit_exact(at):
    whole = parts()
    gains = train(*whole.values(), 20)
    first = parts()
    train(*first.values(), at)
    second = carry(first, parts())
    assert train(*second.values(), 20 - at, start=at) == gains[at:]
    assert second["controller"].state_dict() == whole["controller"].state_dict()


def test_the_state_has_the_same_names_whatever_the_metric():
    adam_state, euclidean = (parts(metric)["controller"].state_dict() for metric in ("adam", "euclidean"))
    assert adam_state.keys() == euclidean.keys()
    assert {"metric_variance", "metric_sqnorm", "metric_weight", "metric_samples", "metric_iterations"} < set(euclidean)
    assert euclidean["version"] == 3


@pytest.mark.parametrize("metric", ["adam", "euclidean"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_state_of_an_old_version_loads(metric, version):
    old = parts()
    train(*old.values(), READY + 2)
    state = old["controller"].state_dict()
    before = {name: value for name, value in state.items() if name != "backwards"}
    if version == 1:
        before = {name: value for name, value in before.items() if not name.startswith("metric_")}
    new = carry(old, parts(metric))
    new["controller"].load_state_dict({**before, "version": version})
    now = new["controller"].state_dict()
    assert {name: now[name] for name in before} == {**before, "version": 3}
    assert now["backwards"] == 0
    assert version == 2 or (now["metric_weight"], now["metric_samples"], now["metric_iterations"]) == (0, 0, 1)
    (gain,) = train(*new.values(), 1, start=READY + 2)
    assert 1 <= gain <= 4


def test_a_euclidean_run_passes_over_the_metric_of_the_state():
    old, plain = parts(), parts("euclidean")
    train(*old.values(), READY + 2)
    carry(old, plain)
    state = {name: 0 if name.startswith("metric_") else value for name, value in old["controller"].state_dict().items()}
    bare = carry(old, parts("euclidean"))
    bare["controller"].load_state_dict({**state, "metric_iterations": 1.0})
    assert train(*plain.values(), 2, start=20) == train(*bare.values(), 2, start=20)


def test_the_record_has_both_and_old_records_read(tmp_path):
    model, optimizer = adam()
    controller = anybatch.attach(
        optimizer, model=model, scale="count", total=100, rule=anybatch.AdaScale(metric="adam"),
        record=tmp_path / "run.jsonl",
    )  # fmt: skip
    train(model, optimizer, controller, READY + 1)
    controller.detach()
    steps = anybatch.read_record(tmp_path / "run.jsonl").steps
    assert [math.isnan(s.metric_variance) for s in steps] == [True] * READY + [False]
    assert steps[-1].metric_variance != steps[-1].variance
    text = (tmp_path / "run.jsonl").read_text()
    old = "\n".join(
        line.split(', "metric_variance"')[0] + "}" if '"step"' in line else line for line in text.split("\n")
    )
    assert "metric_sqnorm" not in old
    (tmp_path / "old.jsonl").write_text(old)
    again = anybatch.read_record(tmp_path / "old.jsonl")
    assert again.torn == 0
    assert [s.gain for s in again.steps] == [s.gain for s in steps]
    assert all(math.isnan(s.metric_variance) and math.isnan(s.metric_sqnorm) for s in again.steps)


# ---- refusals ----


def test_values_out_of_range():
    with pytest.raises(anybatch.InvalidValueError, match='metric must be "euclidean" or "adam"'):
        anybatch.AdaScale(metric="fisher")
    with pytest.raises(anybatch.InvalidValueError, match="consecutive=True"):
        anybatch.AdaScale(metric="adam", consecutive=True)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adamax", "RMSprop", "Adafactor"])
@pytest.mark.filterwarnings("ignore:Adafactor")
def test_optimizers_without_a_second_moment_are_refused_at_attach(name):
    model = oracle.make_model()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    with pytest.raises(anybatch.UnsupportedError, match=f"{name} has none: .* Adam, AdamW, NAdam, RAdam"):
        attach(optimizer, model)
    anybatch.attach(optimizer, model=model, scale="count")  # and nothing is left of the attempt


def test_an_unknown_class_is_refused_and_a_subclass_is_not():
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

    class Mine(torch.optim.AdamW):
        pass

    model = oracle.make_model()
    with pytest.raises(anybatch.UnsupportedError, match="Own has none"):
        attach(Own(model.parameters()), model, rule={"exponent": 0.5})
    attach(Mine(model.parameters()), model)
