"""RunRecord(per_layer=...): each layer's moments against a plain float64 loop; who does not ask notices nothing."""

import gc
import json
import math

import common
import pytest
import torch
from torch import nn

import anybatch
from anybatch._gradients.layers import layer_of
from anybatch._scaling import Moments

STEPS = 6


class Net(nn.Module):
    """A root parameter, a weight of its own norm's size (16,384 entries and more), tied weights, a branch left out."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6))
        self.first, self.wide, self.tied = nn.Linear(6, 130), nn.Linear(130, 130), nn.Linear(130, 130)
        self.tied.weight = self.wide.weight
        self.branch, self.last = nn.Linear(130, 130), nn.Linear(130, 3)

    def forward(self, x, *, branch=True):
        x = torch.tanh(self.tied(torch.tanh(self.wide(torch.tanh(self.first(x + self.bias))))))
        return self.last(self.branch(x) + x if branch else x)


LAYERS = {
    "bias": ["bias"],
    "first": ["first.weight", "first.bias"],
    "wide": ["wide.weight", "wide.bias"],
    "tied": ["tied.bias"],
    "branch": ["branch.weight", "branch.bias"],
    "last": ["last.weight", "last.bias"],
}


def net():
    torch.manual_seed(3)
    return Net().double()


def windows(n, steps=STEPS, seed=0):
    """For each step, `n` micro-batches of 4: x, y, and whether the branch is used."""
    g = torch.Generator().manual_seed(seed)
    return [
        [
            (
                torch.randn(4, 6, generator=g).double(),
                torch.randn(4, 3, generator=g).double() + 1,
                (t + i) % 3 > 0,
            )
            for i in range(n)
        ]
        for t in range(steps)
    ]


def loss_of(model, micro_batch):
    x, y, branch = micro_batch
    return (model(x, branch=branch) - y).square().mean()


def trained(windows, *, factor=1.0, start=0, state=None, lines=None, model=None, make=torch.optim.SGD, **options):
    """A run, and the lines of its record."""
    lines = [] if lines is None else lines
    model = net() if model is None else model
    optimizer = make(model.parameters(), lr=0.02)
    per_layer = options.pop("per_layer", None)
    if options.pop("recorded", False):
        options["record"] = lines.append
    elif isinstance(options.get("record"), list):
        path, function = options["record"]
        options["record"] = [anybatch.RunRecord(path, per_layer=per_layer), function]
    elif per_layer is not None:
        options["record"] = anybatch.RunRecord(options["record"], per_layer=per_layer)
    controller = anybatch.attach(optimizer, model=model, **{"scale": "count", **options})
    if state is not None:
        optimizer.load_state_dict(state)
    for window in windows[start:]:
        for micro_batch in window:
            (loss_of(model, micro_batch) * factor / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, controller, lines


def layered(path):
    return anybatch.RunRecord(path, per_layer=1)


def looks(path):
    """The lines of the file that have layers, by their step."""
    return {step.step: step for step in anybatch.read_record(path).steps if step.per_layer}


def expected(model, window, *, sample=1.0):
    """Variance and sqnorm by layer of one step at the model's weights, from each micro-batch's own gradient."""
    named = dict(model.named_parameters())
    n, found = len(window), {}
    grads = []
    for micro_batch in window:
        got = torch.autograd.grad(loss_of(model, micro_batch), list(named.values()), allow_unused=True)
        grads.append({k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(named.items(), got)})
    for layer, names in LAYERS.items():
        variance = square = 0.0
        for name in names:
            mean = sum(g[name] for g in grads) / n
            variance += sum(float((g[name] - mean).square().sum()) for g in grads) / (n - 1)
            square += float(mean.square().sum())
        found[layer] = (sample * variance, square - variance / n)
    return found


def agrees(found, wanted, *, rel=1e-9):
    assert list(found) == list(wanted)
    scale = max(abs(value) for pair in wanted.values() for value in pair)
    for name, (variance, sqnorm) in wanted.items():
        assert found[name].variance == pytest.approx(variance, rel=rel, abs=rel * scale), name
        assert found[name].sqnorm == pytest.approx(sqnorm, rel=rel, abs=rel * scale), name


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize(
    ("options", "sample"),
    [
        ({}, 1.0),
        ({"scale": None, "base_batch": 10, "micro_batch": 4}, 0.4),
        ({"scale": 1}, None),
        ({"rule": anybatch.AdaScale(metric="adam"), "make": torch.optim.Adam}, 1.0),
        ({"rule": anybatch.AdaScale(estimator="paper", smoothing="paper")}, 1.0),
    ],
    ids=str,
)
def test_every_layer_agrees_with_the_plain_loop(n, options, sample, tmp_path):
    data, model = windows(n), net()
    lines, weights = [], []

    def remembered(values):
        lines.append(values)
        weights.append([p.detach().clone() for p in model.parameters()])

    before = [p.detach().clone() for p in model.parameters()]
    *_, controller, _ = trained(data, model=model, per_layer=2, record=[tmp_path / "r.jsonl", remembered], **options)
    controller.detach()
    found = looks(tmp_path / "r.jsonl")
    assert sorted(found) == [1, 3, 5]  # the first step, and then whenever two more have counted
    for step, line in found.items():
        with torch.no_grad():
            for p, w in zip(model.parameters(), before if step == 1 else weights[step - 2], strict=True):
                p.copy_(w)
        wanted = expected(model, data[step - 1], sample=1 / n if sample is None else sample)
        agrees(line.per_layer, wanted)


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"scale": 1}, {"rule": anybatch.AdaScale(metric="adam")},
     {"scale": None, "base_batch": 8, "micro_batch": 4, "examples": 40}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_layers_add_up_to_the_whole_and_nothing_of_the_training_changes(options, dtype, tmp_path):
    data = [[(x.to(dtype), y.to(dtype), b) for x, y, b in window] for window in windows(3)]
    make = torch.optim.AdamW
    plain, *_, without = trained(data, model=net().to(dtype), make=make, recorded=True, **options)
    path = tmp_path / "r.jsonl"
    lines = []
    watched, *_, controller, _ = trained(
        data, model=net().to(dtype), make=make, per_layer=1, record=[path, lines.append], **options
    )
    controller.detach()
    assert all(map(torch.equal, plain.parameters(), watched.parameters()))
    for line, other in zip(lines, without, strict=True):  # the same numbers to the last bit, and those of the layers
        assert {**line, "anybatch/seconds": 0} == {**line, **other, "anybatch/seconds": 0}
        assert not [name for name in other if "per_layer" in name]
    found = looks(path)
    assert len(found) == STEPS
    for line in found.values():
        size = line.raw_variance / 3 + abs(line.raw_sqnorm)
        assert sum(m.variance for m in line.per_layer.values()) == pytest.approx(line.raw_variance, rel=1e-7)
        assert sum(m.sqnorm for m in line.per_layer.values()) == pytest.approx(line.raw_sqnorm, abs=1e-7 * size)
        told = lines[line.step - 1]
        for name, moments in line.per_layer.items():
            assert told[f"anybatch/per_layer/{name}/variance"] == moments.variance
            assert told[f"anybatch/per_layer/{name}/sqnorm"] == moments.sqnorm


def test_beside_a_rule_that_measures_some_steps_the_training_does_not_change(tmp_path):
    """A step that is measured by layer alone has its moments in the record, and the averages do not take them."""
    data = windows(3, steps=9)
    found = []
    for every, per_layer in ((2, None), (2, 4), (3, 2), (3, None)):
        path = tmp_path / f"{every}-{per_layer}.jsonl"
        rule = anybatch.AdaScale(every=every)
        model, *_, controller, _ = trained(data, rule=rule, per_layer=per_layer, record=path)
        controller.detach()
        steps = anybatch.read_record(path).steps
        found.append((list(model.parameters()), [s.step for s in steps if s.raw_variance > 0], looks(path)))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert all(map(torch.equal, found[2][0], found[3][0]))
    odd = [1, 3, 5, 7, 9]
    assert [measured for _, measured, _ in found] == [odd, odd, [1, 3, 4, 5, 7, 9], [1, 4, 7]]
    assert [list(looked) for *_, looked in found] == [[], [1, 5, 9], odd, []]
    for line in found[2][2].values():
        assert sum(m.variance for m in line.per_layer.values()) == pytest.approx(line.raw_variance, rel=1e-9)


def test_weights_and_the_loss_scale_are_undone_by_layer_too(tmp_path):
    found = {}
    for factor in (1.0, 64.0):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=factor) if factor > 1 else None
        path = tmp_path / f"{factor}.jsonl"
        controller = anybatch.attach(
            optimizer, model=model, scale="count", grad_scaler=scaler, record=anybatch.RunRecord(path, per_layer=1)
        )
        for window in windows(3, steps=2):
            for weight, micro_batch in zip((1, 2, 5), window, strict=True):
                controller.weight = weight
                loss = loss_of(model, micro_batch) * weight / 8
                (loss if scaler is None else scaler.scale(loss)).backward()
            common.step(optimizer, scaler)
            optimizer.zero_grad()
        controller.detach()
        found[factor] = looks(path)
    line = found[1.0][1]
    assert sum(m.variance for m in line.per_layer.values()) == pytest.approx(line.raw_variance, rel=1e-9)
    assert list(found[64.0]) == [1, 2]
    agrees(found[64.0][1].per_layer, {k: (m.variance, m.sqnorm) for k, m in line.per_layer.items()})


def test_together_and_observe_are_looked_at(tmp_path):
    data = windows(3, steps=1)
    wanted = expected(net(), data[0])

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    controller = anybatch.attach(optimizer, model=model, scale="count", record=layered(tmp_path / "a.jsonl"))
    for micro_batch in data[0]:
        with controller.together():
            (loss_of(model, micro_batch) / 6).backward()
            (loss_of(model, micro_batch) / 6).backward()
    optimizer.step()
    controller.detach()
    agrees(looks(tmp_path / "a.jsonl")[1].per_layer, wanted)

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    controller = anybatch.attach(optimizer, model=model, scale="count", record=layered(tmp_path / "b.jsonl"))
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(loss_of(model, m), parameters, allow_unused=True) for m in data[0]]
    columns = [[torch.zeros_like(p) if g is None else g for g in gs] for p, gs in zip(parameters, zip(*grads))]
    controller.observe([torch.stack(column) for column in columns])
    optimizer.step()
    controller.detach()
    agrees(looks(tmp_path / "b.jsonl")[1].per_layer, wanted)


def test_sparse_gradients_and_a_layer_that_comes_later(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 4, sparse=True), nn.Linear(4, 2), nn.Linear(2, 1))
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count", record=layered(tmp_path / "r.jsonl"))

    def step():
        for _ in range(3):
            (model(torch.randint(30, (4, 2))).square().mean() / 3).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    model[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    for _ in range(2):  # the first with new parameters is not measured
        step()
    controller.detach()
    found = looks(tmp_path / "r.jsonl")
    assert [list(line.per_layer) for line in found.values()] == [["0", "2"], ["0", "1", "2"]]
    for line in found.values():
        assert sum(m.variance for m in line.per_layer.values()) == pytest.approx(line.raw_variance, rel=1e-6)


def test_between_the_measured_steps_no_view_is_kept(tmp_path):
    """The table has a view for each parameter and micro-batch."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    record = anybatch.RunRecord(tmp_path / "run.jsonl", per_layer=3)
    anybatch.attach(optimizer, model=model, scale="count", record=record)
    held = []
    for _ in range(6):
        for _ in range(8):
            (sum(p.sum() for p in model.parameters()) / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        held.append(sum(type(each) is torch.Tensor for each in gc.get_objects()))
    assert held[0] - held[1] >= 8 * 40
    assert held[1] == held[2] == held[4] == held[5]


def test_a_skipped_step_leaves_no_trace_and_the_next_one_is_looked_at(tmp_path):
    data = windows(2)
    x, y, branch = data[2][0]
    data[2][0] = (x, y * math.inf, branch)
    *_, controller, lines = trained(data, per_layer=2, record=tmp_path / "r.jsonl")
    controller.detach()
    steps = anybatch.read_record(tmp_path / "r.jsonl").steps
    assert [(s.step, s.skipped, bool(s.per_layer)) for s in steps] == [
        (1, False, True), (2, False, False), (2, True, False), (3, False, True), (4, False, False), (5, False, True),
    ]  # fmt: skip


def test_a_resumed_run_writes_the_lines_of_one_that_was_never_stopped(tmp_path):
    data, options = windows(2, steps=7), {"per_layer": 3, "total": 100}
    *_, controller, _ = trained(data, record=tmp_path / "whole.jsonl", **options)
    controller.detach()
    model, optimizer, controller, _ = trained(data[:4], record=tmp_path / "cut.jsonl", **options)
    state = optimizer.state_dict()
    controller.detach()
    controller._settings.record[0].close()
    *_, controller, _ = trained(data, model=model, start=4, state=state, record=tmp_path / "cut.jsonl", **options)
    controller.detach()
    found, wanted = (anybatch.read_record(tmp_path / name).steps for name in ("cut.jsonl", "whole.jsonl"))
    assert [step.step for step in wanted if step.per_layer] == [1, 4, 7]
    as_text = [[{**vars(step), "seconds": 0} for step in steps] for steps in (found, wanted)]
    assert str(as_text[0]) == str(as_text[1])


def test_a_state_that_is_loaded_after_the_backward_makes_no_look_of_what_was_not_looked_at(tmp_path):
    data = windows(2, steps=3)
    model, optimizer, controller, _ = trained(data[:1], per_layer=2, record=tmp_path / "r.jsonl")
    for micro_batch in data[1]:
        (loss_of(model, micro_batch) / 2).backward()
    controller.load_state_dict({**controller.state_dict(), "steps": 2})  # the second step was not to be looked at
    optimizer.step()
    controller.detach()
    last = anybatch.read_record(tmp_path / "r.jsonl").steps[-1]
    assert last.step == 3
    assert last.raw_variance > 0
    assert not last.per_layer


# ---- names ----


def test_a_layer_is_a_module_by_the_name_it_had_before_it_was_wrapped():
    model = net()
    assert list(dict.fromkeys(layer_of(name, model) for name, _ in model.named_parameters())) == list(LAYERS)
    compiled = torch.compile(net(), backend="eager")
    assert list(dict.fromkeys(layer_of(name, compiled) for name, _ in compiled.named_parameters())) == list(LAYERS)
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    outer = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(2, 2))), nn.Module())
    outer[1].module = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))  # a module of the user's own of this name
    assert {layer_of(name, outer) for name, _ in outer.named_parameters()} == {"0.0", "1.module"}


# ---- refusals ----


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_per_layer_is_a_number_of_steps(value, tmp_path):
    with pytest.raises(anybatch.InvalidValueError, match="per_layer is a number of steps"):
        anybatch.RunRecord(tmp_path / "r.jsonl", per_layer=value)


def test_what_cannot_be_measured_by_layer_is_refused(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(anybatch.UsageError, match="measures no noise"):
        anybatch.attach(optimizer, model=model, scale=2, rule=anybatch.Linear(), record=layered(tmp_path / "a.jsonl"))
    assert [p._backward_hooks for p in model.parameters()] in ([None, None], [{}, {}])
    anybatch.attach(optimizer, model=model, scale=1, record=layered(tmp_path / "b.jsonl"))
    model(torch.ones(1, 2)).sum().backward()
    with pytest.warns(anybatch.AnybatchWarning, match="none by layer either"):
        optimizer.step()


# ---- the record ----


def line(i, **layers):
    names = ["tau", "iterations", "scale", "raw_variance", "raw_sqnorm", "variance", "sqnorm", "gain", "lr"]
    values = dict.fromkeys([*names, "lr_factor", "noise_scale", "seconds"], 1.5)
    layers = {name: Moments(*pair) for name, pair in layers.items()}
    return anybatch.StepRecord(**{**values, "step": i, "count": 2, "tau": float(i), "per_layer": layers})


def test_a_window_is_the_mean_of_its_looks(tmp_path):
    path = tmp_path / "r.jsonl"
    with_layers = [
        line(1, a=(4.0, 1.0), b=(2.0, -1.0)), line(2), line(3, a=(2.0, 3.0)),
        line(4, a=(0.0, 0.5), b=(math.nan, 1.0)), line(5, a=(9.0, 9.0), b=(1.0, 3.0)),
    ]  # fmt: skip
    record = anybatch.RunRecord(path)
    for each in with_layers:
        record.write(each)
    record.close()
    run = anybatch.read_record(path)
    assert [list(step.per_layer) for step in run.steps] == [["a", "b"], [], ["a"], ["a", "b"], ["a", "b"]]
    assert run.steps[0] == with_layers[0]
    assert "per_layer" not in path.read_text().splitlines()[2]
    assert run.per_layer() == {"a": Moments(3.75, 3.375), "b": Moments(1.5, 1.0)}
    assert run.per_layer(1, 4) == {"a": Moments(1.0, 1.75)}  # of b nothing is known there
    assert run.per_layer(begin=4) == {"a": Moments(9.0, 9.0), "b": Moments(1.0, 3.0)}
    assert run.per_layer(end=0.5) == {}


@pytest.mark.parametrize(
    "value", [3, "many", [1, 2], {"a": 1}, {"a": [1]}, {"a": [1, 2, 3]}, {"a": "12"}, {"a": [True, 1]}, {"a": [{}, 1]}]
)
def test_a_damaged_field_is_a_line_that_cannot_be_read(value, tmp_path):
    path = tmp_path / "r.jsonl"
    record = anybatch.RunRecord(path)
    for i in (1, 2):
        record.write(line(i, a=(4.0, 1.0)))
    record.close()
    header, first, second = map(json.loads, path.read_text().splitlines())
    path.write_text("\n".join(map(json.dumps, (header, {**first, "per_layer": value}, second))) + "\n")
    run = anybatch.read_record(path)
    assert ([step.step for step in run.steps], run.torn) == ([2], 1)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    record = anybatch.RunRecord(tmp_path / "r.jsonl")
    record.write(line(1, a=(math.nan, math.inf)))
    assert '"per_layer": {"a": [null, null]}' in (tmp_path / "r.jsonl").read_text()
    [found] = anybatch.read_record(tmp_path / "r.jsonl").steps
    assert math.isnan(found.per_layer["a"].sqnorm)
    assert anybatch.read_record(tmp_path / "r.jsonl").per_layer() == {}
