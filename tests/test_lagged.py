"""lagged=True: each gain from the averages up to the step before, and nothing waited for."""

import math

import oracle
import pytest
import torch
from common import attach_task

import anybatch
from anybatch._gradients import witness


def train(model, optimizer, controller, steps, *, start=0, counts=(3,)):
    gains = []
    for t in range(start, start + steps):
        n = counts[t % len(counts)]
        for i in range(n):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(model(x), y) / n).backward()
        optimizer.step()
        optimizer.zero_grad()
        gains.append(controller.gain)
    return gains


@pytest.mark.parametrize("counts", [(3,), (2, 5)], ids=str)
def test_agrees_with_the_plain_loop(counts):
    gains, taus, weights = oracle.adascale(steps=14, counts=counts, lagged=True)
    assert gains[0] == 1
    model = oracle.make_model()
    optimizer, controller = attach_task(model, lagged=True)
    assert train(model, optimizer, controller, 14, counts=counts) == pytest.approx(gains, rel=1e-6)
    assert controller.tau == pytest.approx(taus[-1], rel=1e-6)
    for p, w in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-6)


def test_resuming_is_bit_exact():
    whole = oracle.make_model()
    optimizer, controller = attach_task(whole, lagged=True)
    train(whole, optimizer, controller, 12)
    parts = None
    model = oracle.make_model()
    for start, steps in ((0, 1), (1, 5), (6, 6)):
        optimizer, resumed = attach_task(model, lagged=True)
        scheduler = resumed._drivers[0]._scheduler
        if parts is not None:
            for part, state in zip((optimizer, scheduler, resumed), parts, strict=True):
                part.load_state_dict(state)
        train(model, optimizer, resumed, steps, start=start)
        parts = [part.state_dict() for part in (optimizer, scheduler, resumed)]
        resumed.detach()
    assert resumed.state_dict() == controller.state_dict()
    assert all(map(torch.equal, whole.parameters(), model.parameters()))


def test_a_look_at_the_state_changes_nothing():
    runs = []
    for look in (False, True):
        model = oracle.make_model()
        optimizer, controller = attach_task(model, lagged=True)
        gains = []
        for t in range(8):
            gains += train(model, optimizer, controller, 1, start=t)
            if look:
                controller.state_dict()
        runs.append(gains)
    assert runs[0] == runs[1]


def test_a_non_finite_gradient_never_enters_the_averages():
    model = oracle.make_model()
    optimizer, controller = attach_task(model, lagged=True)
    train(model, optimizer, controller, 3)
    before = controller.state_dict()
    kept = [p.detach().clone() for p in model.parameters()]
    x, y = oracle.micro_batch(0, 0)
    (math.inf * oracle.loss_fn(model(x), y)).backward()
    oracle.loss_fn(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state.clear()
    with torch.no_grad():
        for p, k in zip(model.parameters(), kept, strict=True):
            p.copy_(k)
    after = controller.state_dict()
    assert (after["variance"], after["sqnorm"]) == (before["variance"], before["sqnorm"])
    assert all(map(math.isfinite, train(model, optimizer, controller, 3, start=4)))


@pytest.mark.parametrize("lagged", [False, True])
def test_one_read_of_a_tensor_a_step(monkeypatch, lagged):
    """The exact step waits for its own numbers; the lagged one reads those of the step before, which lie ready.

    As on a device: on a host a gradient is looked at, which waits for nothing.
    """
    monkeypatch.setattr(witness, "_on_host", lambda _: False)
    model = oracle.make_model()
    optimizer, controller = attach_task(model, lagged=lagged)
    train(model, optimizer, controller, 2)
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self, original=original, name=name):
            reads.append(name)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    train(model, optimizer, controller, 3, start=2)
    assert reads == ["tolist"] * 3


def test_the_record_tells_the_moments_that_a_gain_came_from(tmp_path):
    model = oracle.make_model()
    optimizer, controller = attach_task(model, lagged=True, record=tmp_path / "run.jsonl")
    train(model, optimizer, controller, 4)
    steps = anybatch.read_record(tmp_path / "run.jsonl").steps
    assert math.isnan(steps[0].raw_variance)
    assert steps[0].gain == 1
    assert steps[1].gain == pytest.approx(anybatch.gain(steps[1].variance, steps[1].sqnorm, 3) ** 0.5)  # of one sample


def test_a_checkpoint_between_steps_changes_no_line_of_the_record(tmp_path):
    lines = []
    for saves in (False, True):
        model = oracle.make_model()
        path = tmp_path / f"{saves}.jsonl"
        optimizer, controller = attach_task(model, lagged=True, record=path)
        for t in range(6):
            train(model, optimizer, controller, 1, start=t)
            if saves and t == 3:
                controller.state_dict()
        lines.append([(s.raw_variance, s.raw_sqnorm, s.gain) for s in anybatch.read_record(path).steps[1:]])
    assert lines[0] == lines[1]
    assert all(math.isfinite(raw) for raw, _, _ in lines[0])
