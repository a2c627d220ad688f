"""Damaged states: each is refused by a StateError that leaves the object as it was, or is a state that a run comes to.

The damage is drawn from a seed; what a run comes to is said here in plain words of its own.
"""

import contextlib
import copy
import math
import random

import pytest
import torch
from torch import nn

import anybatch

HUGE = 10**400
JUNK = [
    None, True, False, "3", "", b"1", [], [1.0], {}, (), object(), 1j, math.nan, math.inf, -math.inf, HUGE, -HUGE,
    10**5000, -1, -0.5, 0.5, 2.5, 1e300, -1e300, 5e-324, 2**60, 10**20, torch.tensor(3.0), torch.tensor([1.0, 2.0]),
    torch.zeros(0), torch.tensor(True), torch.tensor(math.nan), torch.zeros(2, 2, device="meta"), torch.ones(2),
    torch.ones(3, 2, dtype=torch.complex64), torch.ones(3, 2, dtype=torch.int64),
    torch.eye(3).to_sparse(), nn.Linear(2, 3),
]  # fmt: skip
NO_STATES = [None, 3, "state", [], [("tau", 1.0)], {}, {1: 2, "a": 3}, {"version": 2}, object(), nn.Linear(2, 3)]


def damaged(state, draw):
    """A copy with one to three damages, deep inside too."""
    state = copy.deepcopy(state)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place = state
        while True:
            inner = [key for key, value in place.items() if isinstance(value, dict)]
            if not inner or draw.random() < 0.6:
                break
            place = place[draw.choice(inner)]
        if not place:
            continue
        key, other = draw.choice(list(place)), draw.choice(list(place))
        kind = draw.choice(["junk"] * 6 + ["scaled", "swapped", "missing", "more", "renamed"])
        if kind == "junk":
            place[key] = draw.choice(JUNK)
        elif kind == "scaled" and isinstance(place[key], int | float):
            with contextlib.suppress(OverflowError):  # an integer that an earlier damage made too large
                place[key] = place[key] * draw.choice([-1, 1e-9, 1e9, 1e200])
        elif kind == "swapped":
            place[key], place[other] = place[other], place[key]
        elif kind == "missing":
            del place[key]
        elif kind == "more":
            place[draw.choice(["more", 7, None])] = draw.choice(JUNK)
        elif kind == "renamed":
            place[draw.choice(["other", 7])] = place.pop(key)
    return state


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def loads(thing, states):
    """Load each; returns the numbers of those taken, with what the object says afterwards, and of those refused."""
    taken, refused = [], 0
    good = copy.deepcopy(thing.state_dict())
    for state in states:
        try:
            thing.load_state_dict(state)
        except anybatch.StateError:
            refused += 1
            assert same(thing.state_dict(), good), state
            continue
        taken.append((state, copy.deepcopy(thing.state_dict())))
        thing.load_state_dict(good)
        assert same(thing.state_dict(), good)
    return taken, refused


def trained(*, rule=None, scheduled=False, steps=3):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5) if scheduled else None
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, rule=rule, total=50, base_batch=4, micro_batch=4
    )
    for _ in range(steps):
        for x in torch.randn(3, 4, 4):
            (model(x).square().mean() / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    return controller


def number(value):
    """A Python number, of a tensor with one element too; no bool."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    assert isinstance(value, int | float)
    assert not isinstance(value, bool)
    assert math.isfinite(value)
    return value


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_damaged_state_of_a_controller(scheduled):
    draw, controller = random.Random(1), trained(scheduled=scheduled)
    good = controller.state_dict()
    old = {name: value for name, value in good.items() if not name.startswith("metric_")}
    states = [damaged(good, draw) for _ in range(600)] + [damaged({**old, "version": 1}, draw) for _ in range(100)]
    taken, refused = loads(controller, states + NO_STATES)
    assert refused > 400
    assert len(taken) > 20
    for state, now in taken:
        given = {name: number(value) for name, value in state.items()}
        assert given["base_batch"] in (0, 4)  # 0: not said
        offset = given["schedule_offset"] if scheduled else 0
        expected = {**given, "version": 3, "base_batch": 4, "schedule_offset": offset}
        assert {name: now[name] for name in given} == expected
        for name in ("steps", "skipped", "samples", "metric_samples", "schedule_offset"):
            assert now[name] == int(now[name])
        for prefix in ("", "metric_"):
            assert now[prefix + "samples"] >= 0
            assert 0 <= now[prefix + "weight"] <= 1.001
            assert now[prefix + "iterations"] >= 0
        assert min(now["tau"], now["steps"], now["skipped"], now["base_batch"]) >= 0
        assert now["parameters"] == 5
        assert now["tau"] + 0.5 > now["tau"]  # else the clock would stand still


@pytest.mark.parametrize("name", ["tau", "steps", "skipped", "samples", "weight", "base_batch"])
@pytest.mark.parametrize("value", [-1, "3", True, None, pytest.param(HUGE, id="huge"), math.nan, math.inf])
def test_no_number_of_a_controllers_state_is_guessed(name, value):
    controller = trained()
    good = controller.state_dict()
    with pytest.raises(anybatch.StateError, match=name):
        controller.load_state_dict({**good, name: value})
    assert controller.state_dict() == good


def test_the_steps_go_on_after_every_state_that_was_taken():
    draw = random.Random(2)
    for _ in range(120):
        controller = trained(steps=2)
        try:
            controller.load_state_dict(damaged(controller.state_dict(), draw))
        except anybatch.StateError:
            continue
        optimizer, model = controller._optimizers[0], controller._optimizers[0].param_groups[0]["params"]
        before = controller.tau
        controller.observe([torch.randn(3, *p.shape) for p in model])
        optimizer.step()
        assert 1 - 1e-9 <= controller.gain <= 3 + 1e-9
        assert controller.tau > before


@pytest.mark.parametrize("kind", ["batch", "seesaw"])
def test_a_damaged_state_of_who_chooses_the_batch(kind):
    draw, controller = random.Random(3), trained(scheduled=True, steps=0)
    if kind == "batch":
        batch = anybatch.BatchController(controller, bounds=(2, 64))
    else:
        batch = anybatch.Seesaw(controller, bounds=(2, 64))
    for _ in range(4):
        controller.observe([torch.randn(3, 1, 4), torch.randn(3, 1)])
        controller._optimizers[0].step()
    taken, refused = loads(batch, [damaged(batch.state_dict(), draw) for _ in range(400)] + NO_STATES)
    assert refused > 200
    assert len(taken) > 20
    for state, now in taken:
        assert list(map(number, state.values()))
        assert 2 <= now["scale"] <= 64
        assert now["scale"] == min(64, max(2, number(state["scale"]))) > 0
        assert now.get("peak", 0) >= 0


@pytest.mark.parametrize("decays", [0.9, (0.9, 0.99)])
def test_a_damaged_state_of_an_average(decays):
    draw, model = random.Random(4), nn.Linear(2, 3)
    ema = anybatch.ModelEMA(model, decays, update_every=2)
    ema.update(2.0), ema.update(3.0), ema.update(1.5)  # the last one is pending
    good = ema.state_dict()
    assert good["waiting"] == 1
    first = {"version": 1, "decay": 0.9, "averages": {f"module.{n}": a for n, a in good["averages"].items()}}
    states = [damaged(good, draw) for _ in range(500)]
    states += [damaged(first, draw) for _ in range(100)] if decays == 0.9 else []
    taken, refused = loads(ema, states + NO_STATES)
    assert refused > 300
    assert len(taken) > 20
    for state, now in taken:
        assert now["decay"] == good["decay"]
        for name in ("tau", "pending", "waiting") if state["version"] == 2 else ():
            given = state[name].item() if isinstance(state[name], torch.Tensor) else state[name]
            assert now[name] == given >= 0
            assert not isinstance(given, bool | str)
        assert now["waiting"] == int(now["waiting"])
        for key in [key for key in now if key.startswith("averages")]:
            for name, average in now[key].items():
                given = next(v for n, v in state[key].items() if n.removeprefix("module.") == name)
                assert torch.equal(average, given)


def theirs(model, form):
    named = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
    if form == "AveragedModel":
        return {"n_averaged": torch.tensor(7), **named}
    shadows = [p.detach().clone() for p in model.parameters()]
    return {"decay": 0.999, "num_updates": 7, "shadow_params": shadows, "collected_params": None}


@pytest.mark.parametrize("form", ["AveragedModel", "torch_ema"])
def test_a_damaged_state_of_another_library(form):
    draw, model = random.Random(5), nn.Linear(2, 3)
    ema = anybatch.ModelEMA(nn.Linear(2, 3), 0.9)
    good = copy.deepcopy(ema.state_dict())
    refused = 0
    for state in [damaged(theirs(model, form), draw) for _ in range(400)] + NO_STATES:
        try:
            found = anybatch.ema_state_from(state, ema=ema)
        except anybatch.StateError:
            refused += 1
            continue
        assert found["tau"] >= 0
        assert found["tau"] in (math.inf, int(min(found["tau"], 2**60)))
        ema.load_state_dict(found)  # what was read can be loaded
        ema.load_state_dict(good)
    assert refused > 150
    assert same(ema.state_dict(), good)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_a_state_of_another_form_of_the_scale_is_warned_of(trained, swap):
    """A variance under `scale="count"` is that of one backward's batch; of sizes it is that of `base_batch`."""
    forms = [{"scale": "count"}, {"base_batch": 16, "micro_batch": 4}]
    models = [nn.Linear(3, 1), nn.Linear(3, 1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    first, second = (
        anybatch.attach(optimizer, model=model, **form)
        for optimizer, model, form in zip(optimizers, models, forms[::-1] if swap else forms, strict=True)
    )
    if trained:
        for _ in range(2):
            (models[0](torch.randn(4, 3)).square().mean() / 2).backward()
        optimizers[0].step()
    state = first.state_dict()
    expected = pytest.warns(anybatch.AnybatchWarning, match="in the same form") if trained else contextlib.nullcontext()
    with expected:
        second.load_state_dict(state)
    assert second.tau == first.tau
