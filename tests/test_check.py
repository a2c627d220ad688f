"""check: each trap of a hand-written step is found, with its text, and a right step passes."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import anybatch

OPTIONS = {"base_batch": 8, "micro_batch": 4, "total": 100}


def made(*, layers=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def data(n=8):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=draw), {"y": torch.randn(n, 2, generator=draw), "name": "y"}


def right(model, optimizer, controller, batch, *, size=4, reduction="mean", share=None, backwards=1):
    x, y = batch[0].split(size), batch[1]["y"].split(size)
    for a, b in zip(x, y, strict=True):
        loss = mse_loss(model(a), b, reduction=reduction) / (share or len(x))
        for i in range(backwards):
            (loss / backwards).backward(retain_graph=i < backwards - 1)
    optimizer.step()
    optimizer.zero_grad()


def checked(step, **options):
    model, optimizer = made(layers=options.pop("layers", ()))
    return anybatch.check(step, model=model, optimizer=optimizer, batch=data(), **OPTIONS | options)


def wrong(found):
    """Part to text of what is wrong, without the library's own warnings."""
    texts = {}
    for f in found.findings:
        if not f.right and f.part != "warning":
            texts[f.part] = " ".join([*texts.get(f.part, "").split(), f.text])
    return texts


def test_a_right_step_passes_and_nothing_outside_moves():
    model, optimizer = made()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = anybatch.check(
            right, model=model, optimizer=optimizer, scheduler=scheduler, batch=data(), times=3, **OPTIONS
        )
    assert found.ok, str(found)
    assert not caught
    assert torch.rand(1) == expected
    assert [f.part for f in found.findings] == ["sizes", "means", "means", "schedule", "clearing"]
    assert found.findings[0].text == "2 backwards counted as scale 1, 6 as scale 3."
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (0, 0.1)
    anybatch.attach(optimizer, model=model, scheduler=scheduler, **OPTIONS).detach()  # it was not attached


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (lambda m, o, c, b: [o.zero_grad(), right(m, o, c, b)], {}),
        (lambda m, o, c, b: right(m, o, c, b, size=len(b[0]) // 2), {"micro_batch": "auto"}),
        (lambda m, o, c, b: right(m, o, c, b, share=1), {"reduction": "sum"}),
        (lambda m, o, c, b: right(m, o, c, b, size=8), {"micro_batch": None, "base_batch": None, "scale": "count"}),
        (right, {"layers": (nn.BatchNorm1d(8),)}),
        (right, {"layers": (nn.Dropout(0.01),)}),
        (right, {"record": "/nowhere/at/all.jsonl"}),
    ],
)
def test_other_right_steps_pass(step, options):
    found = checked(step, **options)
    assert found.ok, str(found)


def test_parts_of_the_controller_and_clipping_pass():
    def step(model, optimizer, controller, batch):
        n = len(batch[0]) // 4
        for (x, y), share in controller.parts((batch[0], batch[1]["y"]), n):
            (mse_loss(model(x), y) * share).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    assert checked(step).ok


def test_several_optimizers_pass():
    model, _ = made()
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters(), lr=0.1)]

    def step(model, optimizers, controller, batch):
        for x, y in zip(batch[0].chunk(2), batch[1]["y"].chunk(2), strict=True):
            (mse_loss(model(x), y) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    found = anybatch.check(
        step, model=model, optimizer=optimizers, batch=data(), base_batch=8, micro_batch="auto", total=9
    )
    assert found.ok, str(found)


TRAPS = {
    "a micro_batch that is too large": (
        right, {"micro_batch": 8}, "sizes",
        "2 backwards counted as scale 2, 8 as scale 8. It should be 1 and 4: all scales are wrong by the factor "
        "2. Pass one base batch."),
    "a number of parts that does not follow the batch": (
        lambda m, o, c, b: right(m, o, c, b, size=len(b[0]) // 2), {}, "sizes",
        "2 backwards counted as scale 1, 2 as scale 1. It should be 1 and 4: the scale does not follow the batch."),
    "two backwards of one micro-batch": (
        lambda m, o, c, b: right(m, o, c, b, backwards=2), {}, "sizes",
        "each forward had 2 backwards (8 forwards), and each counts as a micro-batch: put those of one micro-batch "
        "into `with controller.together():`"),
    "a forgotten division": (
        lambda m, o, c, b: right(m, o, c, b, share=1), {}, "means",
        "The base batch repeated 4 times gave 4 times its gradient, in 8 backwards: divide each loss by the number of "
        'micro-batches, or attach(..., reduction="sum").'),
    "a division by what is not the number of parts": (
        lambda m, o, c, b: right(m, o, c, b, share=len(b[0]) ** 2), {}, "means",
        "The base batch repeated 4 times gave 0.25 times its gradient, in 8 backwards: it should be 1."),
    "a division besides reduction='sum'": (
        right, {"reduction": "sum"}, "means", "with reduction='sum' it should be 4 times; do not divide the losses"),
    "a sum over the examples": (
        lambda m, o, c, b: right(m, o, c, b, reduction="sum"), {}, "means",
        "Half of a micro-batch and the same half twice gave gradients that differ by the factor 2, in the same number "
        "of backwards: the loss is a sum over its examples."),
    "no zero_grad": (
        lambda m, o, c, b: [mse_loss(m(b[0]), b[1]["y"]).backward(), o.step()], {"micro_batch": "auto"}, "clearing",
        "Gradients of an earlier step were left: call optimizer.zero_grad() after optimizer.step()."),
    "zero_grad before step": (
        lambda m, o, c, b: [mse_loss(m(b[0]), b[1]["y"]).backward(), o.zero_grad(), o.step()], {"micro_batch": "auto"},
        "clearing", "The gradients were cleared before optimizer.step(): call optimizer.zero_grad() after it."),
    "a step for each micro-batch": (
        lambda m, o, c, b: [right(m, o, c, (x, {"y": y}), size=8)
                            for x, y in zip(b[0].split(4), b[1]["y"].split(4))],
        {}, "clearing", "One call of the step called optimizer.step() 2 or 8 times: it should be once"),
    "no step": (
        lambda m, o, c, b: mse_loss(m(b[0]), b[1]["y"]).backward(), {"micro_batch": "auto"}, "clearing",
        "One call of the step called optimizer.step() 0 times"),
    "no backward": (lambda m, o, c, b: m(b[0]), {}, "means", "no backward reached the weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_found_and_said(name):
    step, options, part, text = TRAPS[name]
    found = checked(step, **options)
    assert not found.ok
    assert text in " ".join(wrong(found).get(part, str(found)).split()), str(found)


@pytest.mark.parametrize(
    "name", ["a forgotten division", "a sum over the examples", "two backwards of one micro-batch"]
)
def test_a_trap_is_found_in_its_own_part_alone(name):
    step, options, part, _ = TRAPS[name]
    assert set(wrong(checked(step, **options))) == {part}


def test_a_scheduler_that_the_loop_steps_is_found_and_put_back():
    model, optimizer = made()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def step(model, optimizer, controller, batch):
        right(model, optimizer, controller, batch)
        scheduler.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = anybatch.check(step, model=model, optimizer=optimizer, scheduler=scheduler, batch=data(), **OPTIONS)
    assert wrong(found) == {
        "schedule": "The step calls scheduler.step(): remove it, for anybatch steps the scheduler with the clock."
    }
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (0, 0.1)


def test_one_gradient_a_step_is_warned_of():
    found = checked(lambda m, o, c, b: right(m, o, c, b, size=len(b[0])), micro_batch="auto")
    assert not wrong(found)
    assert "shows no variance" in found.findings[-1].text


def test_what_the_library_says_is_in_it():
    model, optimizer = made()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    found = anybatch.check(right, model=model, optimizer=optimizer, scheduler=scheduler, batch=data(), **OPTIONS)
    assert [(f.part, f.right) for f in found.findings][-1] == ("warning", False)
    assert "T_max=10" in found.findings[-1].text


def test_a_step_that_trains_the_model_outside_is_an_error():
    model, optimizer = made()

    def step(_, __, controller, batch):
        right(model, optimizer, controller, batch)

    with pytest.raises(anybatch.UsageError, match="trained the original model"):
        anybatch.check(step, model=model, optimizer=optimizer, batch=data(), **OPTIONS)


def test_the_gradients_compared_are_those_of_a_plain_loop():
    """A loss of its own weight for each call: the ratio said is that of the two gradients, worked out by hand."""
    weights = iter([2.0, 1.0, 3.0, 1.0, 1.0, 1.0])

    def step(model, optimizer, controller, batch):
        (model(batch).sum() * next(weights) / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.arange(12.0).reshape(4, 3)
    found = anybatch.check(
        step, model=model, optimizer=optimizer, batch=batch, times=2, base_batch=4, micro_batch="auto"
    )
    assert "gave 1.5 times its gradient, in 1 backward:" in wrong(found)["means"]


def test_a_result_is_read_in_80_columns():
    text = str(checked(TRAPS["a forgotten division"][0]))
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split()[:2] for line in text.splitlines() if not line.startswith(" ")] == [
        ["ok", "sizes"], ["WRONG", "means"], ["ok", "means"], ["ok", "schedule"], ["ok", "clearing"]]  # fmt: skip


@pytest.mark.parametrize("times", [1, True, 2.0, None])
def test_times_out_of_range_are_refused(times):
    with pytest.raises(anybatch.InvalidValueError, match="times"):
        checked(right, times=times)


def test_a_batch_without_examples_is_refused():
    model, optimizer = made()
    with pytest.raises(anybatch.InvalidValueError, match="batch"):
        anybatch.check(right, model=model, optimizer=optimizer, batch=[torch.tensor(1.0), "x"], **OPTIONS)


def test_where_half_a_micro_batch_cannot_be_trained_nothing_is_told_of_sums():
    def step(model, optimizer, controller, batch):
        if len(batch[0]) < 4:
            raise ValueError("too small")
        right(model, optimizer, controller, batch)

    found = checked(step)
    assert found.ok
    assert "gave no evidence" in found.findings[2].text
    one = checked(lambda m, o, c, b: right(m, o, c, b, size=1), micro_batch=1)
    assert one.ok
    assert "gave no evidence" in one.findings[2].text


def test_what_a_step_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        checked(lambda m, o, c, b: 1 / 0)


def test_a_gradient_that_is_not_finite_is_not_compared():
    def step(model, optimizer, controller, batch):
        (model(batch[0]).sum() * math.nan).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert "No gradient to compare" in wrong(checked(step, micro_batch="auto"))["means"]
