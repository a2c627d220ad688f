"""Progressive scaling: the scale as a function of tau, with a controller and without one."""

import io

import oracle
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import anybatch

PLAN = {0: 1, 8: 4, 24: 8, 64: 2}


def optimizer_of(cls=torch.optim.SGD, **options):
    return cls([nn.Parameter(torch.ones(3, dtype=torch.float64))], **options)


def advance(progressive, optimizer, clock, **options):
    """One step with a gradient of ones; the scale it was taken at."""
    scale = progressive.apply(optimizer, clock=clock, **options)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    clock.advance(scale)
    return scale


def values(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def test_the_scale_is_constant_between_its_starts():
    progressive = anybatch.Progressive({24: 8, 0: 1, 8.5: 0.5})
    taus = (0, 8.4, 8.5, 23, 24 - 1e-12, 24, 1e9)
    assert [progressive.scale(tau) for tau in taus] == [1, 1, 0.5, 0.5, 8, 8, 8]


def test_the_rounding_of_a_long_sum_does_not_delay_a_change():
    clock = anybatch.Clock()
    for _ in range(1000):
        clock.advance(0.1)
    assert clock.tau < 100
    assert anybatch.Progressive({0: 1, 100: 2}).scale(clock.tau) == 2


@pytest.mark.parametrize("scales", [{}, {1: 2}, {0: 0}, {0: -1}, {0: 1, -1: 2}, {0: float("nan")},
                                    {0: 1, float("inf"): 2}, {0: 1, "8": 2}, {0: "4"}])  # fmt: skip
def test_scales_in_range(scales):
    with pytest.raises(anybatch.InvalidValueError, match=r"scale|start"):
        anybatch.Progressive(scales)


@pytest.mark.parametrize("rule", ["power", "sde"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3}),
        (torch.optim.AdamW, {"betas": (0.95, 0.999), "weight_decay": 0.5}),
        (torch.optim.RMSprop, {"alpha": 0.99}),
    ],
)
def test_at_every_scale_the_optimizer_is_as_if_scaled_from_the_base(cls, options, rule):
    progressive, clock = anybatch.Progressive(PLAN), anybatch.Clock()
    optimizer = optimizer_of(cls, lr=0.01, **options)
    seen = []
    while clock.tau < 80:
        seen.append(advance(progressive, optimizer, clock, betas_rule=rule))
        direct = optimizer_of(cls, lr=0.01, **options)
        anybatch.scale_optimizer(direct, seen[-1], betas_rule=rule)
        for name, value in values(direct)[0].items():
            if value is None or isinstance(value, bool):
                continue
            assert optimizer.param_groups[0][name] == pytest.approx(value, rel=1e-12), name
    assert seen == [1] * 8 + [4] * 4 + [8] * 5 + [2] * 8


def test_sgd_walks_as_far_in_tau():
    """On a constant gradient a run in steps of other sizes is at the same weights at the same tau."""
    weights = []
    for scales in ({0: 1}, PLAN):
        progressive, clock = anybatch.Progressive(scales), anybatch.Clock()
        optimizer = optimizer_of(lr=0.01)
        while clock.tau < 80:
            advance(progressive, optimizer, clock)
        assert clock.tau == 80
        weights.append(optimizer.param_groups[0]["params"][0].detach())
    torch.testing.assert_close(weights[1], weights[0])


def test_adams_debiasing_goes_on_through_changes():
    """Under a constant gradient Adam's debiased step is exactly lr, whatever the betas were along the way."""
    progressive, clock = anybatch.Progressive({0: 1, 3: 2, 9: 0.5}), anybatch.Clock()
    optimizer = optimizer_of(torch.optim.Adam, lr=0.01, eps=1e-12)
    p = optimizer.param_groups[0]["params"][0]
    for _ in range(14):
        before = p.detach().clone()
        scale = advance(progressive, optimizer, clock)
        torch.testing.assert_close(before - p.detach(), torch.full_like(p, 0.01 * scale**0.5), rtol=1e-6, atol=0)


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
    "warmup": lambda o: lr_scheduler.LambdaLR(o, lambda i: min(i / 10, 1)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=80, eta_min=1e-3),
    "step": lambda o: lr_scheduler.StepLR(o, 7, gamma=0.5),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=60),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=9), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[9]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=9), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_at_floor_tau_and_sees_base_values(name):
    base = optimizer_of(torch.optim.AdamW, lr=0.05, weight_decay=0.5)
    scheduler, expected = SCHEDULES[name](base), []
    for i in range(101):
        expected.append((base.param_groups[0]["lr"], base.param_groups[0]["betas"]))
        base.step()
        if name != "onecycle" or i < 59:
            scheduler.step()
    progressive, clock = anybatch.Progressive({0: 2.5, 10: 8, 50: 0.5}), anybatch.Clock()
    optimizer = optimizer_of(torch.optim.AdamW, lr=0.05, weight_decay=0.5)
    scheduler = SCHEDULES[name](optimizer)
    while clock.tau < 100:
        at = clock.iteration
        scale = advance(progressive, optimizer, clock, scheduler=scheduler)
        lr, betas = expected[at]
        group = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(lr * scale**0.5, rel=1e-9)
        assert group["betas"] == pytest.approx(tuple(b**scale for b in betas), rel=1e-9)
        assert 1 - group["lr"] * group["weight_decay"] == pytest.approx((1 - lr * 0.5) ** scale, rel=1e-9)


def test_the_models_average_follows_the_clock():
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    start = model.weight.detach().clone()
    clock, progressive = anybatch.Clock(total=96), anybatch.Progressive(PLAN)
    ema = anybatch.ModelEMA(model, 0.99, clock=clock)
    with torch.no_grad():
        model.weight.add_(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    while not clock.done:
        advance(progressive, optimizer, clock)
    with ema.applied():
        torch.testing.assert_close(model.weight.detach(), start + 1 - 0.99**clock.tau)


@pytest.mark.parametrize("schedule", [None, "cosine", "lambda"])
def test_resuming_is_bit_exact_and_needs_only_what_is_saved_anyway(schedule):
    def build():
        optimizer = optimizer_of(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
        return optimizer, SCHEDULES[schedule](optimizer) if schedule else None

    def train(resume_at):
        progressive, clock = anybatch.Progressive({0: 2, 8: 4, 24: 3}), anybatch.Clock()
        optimizer, scheduler = build()
        for step in range(14):
            if step == resume_at:
                file = io.BytesIO()
                saved = {"optimizer": optimizer.state_dict(), "tau": clock.tau, "p": weights(optimizer)}
                saved |= {"scheduler": scheduler.state_dict()} if schedule == "cosine" else {}
                torch.save(saved, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                old, (optimizer, scheduler) = scheduler, build()
                with torch.no_grad():
                    optimizer.param_groups[0]["params"][0].copy_(saved["p"])
                optimizer.load_state_dict(saved["optimizer"])
                if scheduler:
                    scheduler.load_state_dict(old.state_dict())
                progressive, clock = anybatch.Progressive({0: 2, 8: 4, 24: 3}), anybatch.Clock()
                clock.tau = saved["tau"]
            advance(progressive, optimizer, clock, scheduler=scheduler)
        return weights(optimizer)

    def weights(optimizer):
        return optimizer.param_groups[0]["params"][0].detach().clone()

    plain = train(None)
    for resume_at in (1, 4, 5, 9):
        assert torch.equal(train(resume_at), plain)


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_keep_the_mark(flat):
    """A flattened state has only the entries that the new optimizer has: hence the message to call apply before it."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    progressive, clock = anybatch.Progressive({0: 1, 4: 4}), anybatch.Clock()
    models = [nn.Linear(2, 2) for _ in range(2)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in models]
    while clock.tau < 12:
        advance(progressive, optimizers[0], clock)
    saved = get_optimizer_state_dict(models[0], optimizers[0], options=options)
    if flat:
        late = anybatch.Clock()
        late.tau = 12
        with pytest.raises(anybatch.UsageError, match="before a flattened state"):
            progressive.apply(optimizers[1], clock=late)
        progressive.apply(optimizers[1], clock=anybatch.Clock())
    set_optimizer_state_dict(models[1], optimizers[1], saved, options=options)
    progressive.apply(optimizers[1], clock=clock)
    assert values(optimizers[1]) == values(optimizers[0])


def test_a_group_added_later_joins():
    progressive, clock = anybatch.Progressive({0: 4, 16: 8}), anybatch.Clock()
    optimizer = optimizer_of(torch.optim.Adam, lr=0.01)
    advance(progressive, optimizer, clock)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.03})
    advance(progressive, optimizer, clock)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.06])
    assert [group["betas"][0] for group in optimizer.param_groups] == pytest.approx([0.9**4] * 2)


def test_a_beta_out_of_range_is_refused_with_nothing_changed():
    progressive, clock = anybatch.Progressive({0: 2, 4: 16}), anybatch.Clock()
    optimizer = optimizer_of(torch.optim.Adam, lr=0.01)
    scheduler = SCHEDULES["cosine"](optimizer)
    for _ in range(2):
        advance(progressive, optimizer, clock, scheduler=scheduler, betas_rule="sde")
    before = values(optimizer), scheduler.last_epoch
    with pytest.raises(anybatch.InvalidValueError, match="kappa must be below 5;"):
        progressive.apply(optimizer, clock=clock, scheduler=scheduler, betas_rule="sde")
    assert (values(optimizer), scheduler.last_epoch) == before


def test_a_scheduler_that_raises_leaves_the_values_of_the_scale():
    progressive, clock = anybatch.Progressive({0: 4}), anybatch.Clock()
    optimizer = optimizer_of(lr=0.01)

    def broken(i):
        if i:
            raise ZeroDivisionError
        return 1

    scheduler = lr_scheduler.LambdaLR(optimizer, broken)
    advance(progressive, optimizer, clock, scheduler=scheduler)
    with pytest.raises(ZeroDivisionError):
        progressive.apply(optimizer, clock=clock, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.04)


def test_a_scheduler_without_a_position_and_one_of_another_optimizer_are_refused():
    class Own:
        def step(self):
            pass

    progressive, clock, optimizer = anybatch.Progressive({0: 4}), anybatch.Clock(), optimizer_of(lr=0.01)
    with pytest.raises(anybatch.InvalidValueError, match="Own has no last_epoch"):
        progressive.apply(optimizer, clock=clock, scheduler=Own())
    clock.advance(1)
    with pytest.raises(anybatch.InvalidValueError, match="another optimizer"):
        progressive.apply(optimizer, clock=clock, scheduler=SCHEDULES["cosine"](optimizer_of(lr=0.01)))


def test_with_a_controller_the_scale_is_what_happens():
    """`scale(controller.tau)` micro-batches a step: the controller counts them, and `apply` is refused."""
    progressive = anybatch.Progressive({0: 1, 10: 2, 30: 4})
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    controller = anybatch.attach(
        optimizer, model=model, rule=anybatch.Linear(), scheduler=scheduler, total=60, base_batch=4, micro_batch=4
    )
    ema = anybatch.ModelEMA(model, 0.9, clock=controller.clock)
    scales, steps = [], 0
    while not controller.done:
        parts = int(progressive.scale(controller.tau))
        for i in range(parts):
            x, y = oracle.micro_batch(steps, i)
            (oracle.loss_fn(model(x), y) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.append(controller.scale)
        steps += 1
    assert scales == [1] * 10 + [2] * 10 + [4] * 8
    assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.eta_min, abs=1e-3)
    assert ema.state_dict()["decay"] == 0.9
    with pytest.raises(anybatch.UsageError, match="controller"):
        progressive.apply(optimizer, clock=controller.clock)


def test_a_controller_does_not_scale_again_what_apply_has_scaled():
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    anybatch.Progressive({0: 4}).apply(optimizer, clock=anybatch.Clock())
    controller = anybatch.attach(optimizer, model=model, rule=anybatch.Linear(), scale=4)
    with pytest.raises(anybatch.UsageError, match=r"scaled this optimizer's values already, by \[4"):
        optimizer.step()
    controller.detach()
    anybatch.Progressive({0: 1}).apply(optimizer, clock=anybatch.Clock())
    controller = anybatch.attach(optimizer, model=model, rule=anybatch.Linear(), scale=4)
    x, y = oracle.micro_batch(0, 0)
    oracle.loss_fn(model(x), y).backward()
    optimizer.step()
    assert controller.lr_factor == 4


def test_scales_without_starts_are_a_typed_error():
    with pytest.raises(anybatch.InvalidValueError, match="maps starts to scales"):
        anybatch.Progressive([1, 2])
