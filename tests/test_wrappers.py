"""What frameworks put around optimizers and schedulers, and schedulers of another kind than torch's."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

import anybatch


class WrappedOptimizer(torch.optim.Optimizer):
    """Of the shape of Accelerate's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        self.optimizer.step(closure)


class Lookahead(WrappedOptimizer):
    """An optimizer around another that keeps a state of its own."""

    state = {}


class WrappedScheduler:
    """Of the shape of Accelerate's: it steps twice, as on two processes."""

    step_with_optimizer = True

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def step(self):
        self.scheduler.step()
        self.scheduler.step()

    def state_dict(self):
        return self.scheduler.state_dict()


class Updated:
    """Of the shape of timm's: it keeps no position, and is told one."""

    def __init__(self, optimizer, *, t_in_epochs=False):
        self.optimizer, self.t_in_epochs = optimizer, t_in_epochs
        self.calls = []

    def step(self, epoch, metric=None):
        if self.t_in_epochs:
            self._set(epoch)

    def step_update(self, num_updates, metric=None):
        if not self.t_in_epochs:
            self._set(num_updates)

    def _set(self, t):
        self.calls.append(t)
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)


def build(lr=0.1):
    model = torch.nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


def step(model, optimizer, count=4):
    for _ in range(count):
        (model(torch.randn(4, 2)).square().mean() / count).backward()
    optimizer.step()
    model.zero_grad()


def linear(optimizer, model, **options):
    """Each step of four backwards moves the clock by 4."""
    return anybatch.attach(optimizer, model=model, rule=anybatch.Linear(), scale="count", **options)


def test_attach_sees_through_both_wrappers_and_the_loop_may_step_the_one_it_holds():
    model, optimizer = build()
    wrapped = WrappedOptimizer(optimizer)
    real = CosineAnnealingLR(wrapped, 40)  # around the wrapper, as the Trainer builds it
    scheduler = WrappedScheduler(real)
    controller = linear(wrapped, model, scheduler=scheduler, total=40)
    while not controller.done:
        step(model, wrapped)
        scheduler.step()
        assert real.last_epoch == controller.clock.iteration
    assert controller.steps == 10
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert scheduler.state_dict() == real.state_dict()
    controller.detach()
    assert scheduler.scheduler is real
    scheduler.step()
    assert real.last_epoch == 42


def test_one_cycle_in_a_wrapper_is_held_at_its_end():
    model, optimizer = build()
    scheduler = WrappedScheduler(OneCycleLR(optimizer, 0.5, total_steps=10))
    linear(optimizer, model, scheduler=scheduler)
    for _ in range(4):
        step(model, optimizer)
        scheduler.step()
    assert scheduler.scheduler.last_epoch == 9


def test_plateau_in_a_wrapper_stays_its_users():
    model, optimizer = build()
    plateau = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    scheduler = WrappedScheduler(plateau)
    controller = linear(optimizer, model, scheduler=scheduler)
    assert scheduler.scheduler is plateau
    controller.detach()
    assert scheduler.scheduler is plateau


def test_what_was_held_before_attach_stays_held_after_detach():
    model, optimizer = build()
    held = anybatch.HeldScheduler(anybatch.HeldScheduler(CosineAnnealingLR(optimizer, 40)))
    assert isinstance(held.scheduler, CosineAnnealingLR)
    wrapper = WrappedScheduler(held)
    controller = linear(optimizer, model, scheduler=wrapper, total=40)
    step(model, optimizer)
    wrapper.step()
    assert held.last_epoch == 4
    controller.detach()
    assert wrapper.scheduler is held
    assert "scheduler" not in held.state_dict()


def test_all_but_the_step_of_a_held_scheduler_is_the_real_ones():
    _, optimizer = build()
    real = CosineAnnealingLR(optimizer, 40)
    held = anybatch.HeldScheduler(real)
    held.step(3, anything=1)
    held._step_count += 5
    assert (real.last_epoch, real._step_count) == (0, 6)
    held.load_state_dict({**real.state_dict(), "last_epoch": 7})
    assert real.last_epoch == held.last_epoch == 7
    assert "step" not in held.state_dict()
    for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        other.step()
        assert other.last_epoch == 7
        assert other.scheduler is not real
    assert "CosineAnnealingLR" in repr(held)
    with pytest.raises(AttributeError, match="CosineAnnealingLR"):
        held.no_such_name  # noqa: B018


def test_a_scheduler_of_a_wrapped_optimizer_that_attach_was_not_given():
    model, optimizer = build()
    wrapped = WrappedOptimizer(optimizer)
    CosineAnnealingLR(wrapped, 40)
    linear(wrapped, model)
    with pytest.warns(anybatch.AnybatchWarning, match="was not passed to attach"):
        step(model, wrapped)


def test_the_same_optimizer_twice_in_two_wrappers():
    model, optimizer = build()
    with pytest.raises(anybatch.InvalidValueError, match="each once"):
        linear([optimizer, WrappedOptimizer(optimizer)], model)


def test_an_optimizer_with_a_state_of_its_own_is_no_wrapper():
    model, optimizer = build()
    with pytest.raises(anybatch.UnsupportedError, match="Lookahead"):
        anybatch.attach(Lookahead(optimizer), model=model, scale="count", rule=anybatch.AdaScale())


@pytest.mark.parametrize("lr", [0.1, 0.3])
def test_a_scheduler_of_timms_kind_is_where_the_clock_is(lr):
    model, optimizer = build(lr)
    scheduler = Updated(optimizer)
    controller = linear(optimizer, model, scheduler=scheduler, schedule_every=2, total=40)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"] / 4))
    while not controller.done:
        step(model, optimizer)
        scheduler.step_update(controller.steps)  # as a loop of timm's does; the clock's position holds at the step
    assert seen == pytest.approx([0.1 / (1 + 4 * k // 2) for k in range(10)])


def test_a_resumed_scheduler_of_timms_kind_needs_no_state():
    model, optimizer = build()
    controller = linear(optimizer, model, scheduler=Updated(optimizer), total=40)
    step(model, optimizer)
    saved = controller.state_dict()
    model, optimizer = build()
    controller = linear(optimizer, model, scheduler=(scheduler := Updated(optimizer)), total=40)
    controller.load_state_dict(saved)
    step(model, optimizer)
    assert scheduler.calls == [4, 8]


def test_a_scheduler_of_timms_kind_that_counts_epochs():
    model, optimizer = build()
    with pytest.raises(anybatch.InvalidValueError, match="counts epochs"):
        linear(optimizer, model, scheduler=Updated(optimizer, t_in_epochs=True))
    controller = anybatch.attach(
        optimizer, model=model, scheduler=(scheduler := Updated(optimizer, t_in_epochs=True)), rule=anybatch.Linear(),
        base_batch=4, micro_batch=4, examples=32, schedule_every="epoch", epochs=3,
    )  # fmt: skip
    while not controller.done:
        step(model, optimizer)
    assert sorted(set(scheduler.calls)) == [0, 1, 2, 3]


class Silent:
    def step(self):
        pass


class WarmUp:
    """A wrapper that does more than to hand on: to see through it would be to leave that out."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def step(self):
        self.scheduler.step()


@pytest.mark.parametrize("make", [lambda _: Silent(), lambda _: WrappedScheduler(Silent()), WarmUp])
def test_an_object_that_tells_no_position_is_refused(make):
    model, optimizer = build()
    with pytest.raises(anybatch.InvalidValueError, match="can be neither read nor set"):
        linear(optimizer, model, scheduler=make(CosineAnnealingLR(optimizer, 40)))


def test_what_took_its_scheduler_back_keeps_it():
    model, optimizer = build()
    scheduler = WrappedScheduler(CosineAnnealingLR(optimizer, 40))
    controller = linear(optimizer, model, scheduler=scheduler)
    other = scheduler.scheduler = CosineAnnealingLR(optimizer, 50)
    controller.detach()
    assert scheduler.scheduler is other


def test_a_scheduler_of_another_optimizer_is_refused_in_a_wrapper_too():
    model, optimizer = build()
    scheduler = WrappedScheduler(CosineAnnealingLR(WrappedOptimizer(build()[1]), 40))
    with pytest.raises(anybatch.InvalidValueError, match="another optimizer"):
        linear(optimizer, model, scheduler=scheduler)


class ZeroOptimizer:
    """DeepSpeed's around a base optimizer: no optimizer of torch's."""

    __module__ = "deepspeed.runtime.zero.stage_1_and_2"
    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("wrap", [ZeroOptimizer, lambda base: WrappedOptimizer(ZeroOptimizer(base))])
def test_the_base_optimizer_inside_of_deepspeeds_is_found(wrap):
    model, optimizer = build()
    controller = linear(wrap(optimizer), model)
    with pytest.raises(anybatch.UsageError, match="has a controller already"):
        linear(optimizer, model)
    controller.detach()


def test_without_its_engine_a_partition_is_a_stranger():
    model, optimizer = build()
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(anybatch.InvalidValueError, match="with DeepSpeed the engine"):
        linear(ZeroOptimizer(optimizer), model)


def in_the_middle(make, **options):
    model, optimizer = build()
    scheduler = make(optimizer)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    return model, optimizer, linear(optimizer, model, scheduler=scheduler, **options)


@pytest.mark.parametrize("make", [lambda o: LambdaLR(o, lambda i: 1 - i / 40), lambda o: CosineAnnealingLR(o, 40)])
def test_a_schedule_ahead_of_the_clock_warns_once(make):
    """A run that resumed with the scheduler's state and without the controller's."""
    model, optimizer, _ = in_the_middle(make, total=40)
    with pytest.warns(anybatch.AnybatchWarning, match="ahead of the clock") as caught:
        step(model, optimizer)
        step(model, optimizer)
    assert len(caught) == 1


def test_a_resumed_schedule_is_not_ahead_whatever_is_loaded_first():
    model, optimizer = build()
    scheduler = CosineAnnealingLR(optimizer, 40)
    controller = linear(optimizer, model, scheduler=scheduler, total=40)
    step(model, optimizer)
    saved = controller.state_dict(), scheduler.state_dict(), optimizer.state_dict()
    model, optimizer = build()
    scheduler = CosineAnnealingLR(optimizer, 40)
    scheduler.load_state_dict(saved[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller = linear(optimizer, model, scheduler=scheduler, total=40)
        controller.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[2])
        while not controller.done:
            step(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_resumed_schedule_that_does_not_fit_is_said_with_the_position_of_its_beginning():
    model, optimizer = build()
    scheduler = CosineAnnealingLR(optimizer, 40)
    controller = linear(optimizer, model, scheduler=scheduler, total=40)
    step(model, optimizer)
    saved = controller.state_dict()
    model, optimizer = build()
    scheduler = CosineAnnealingLR(optimizer, 80)
    scheduler.last_epoch = 4
    controller = linear(optimizer, model, scheduler=scheduler, total=40)
    controller.load_state_dict(saved)
    with pytest.warns(anybatch.AnybatchWarning, match="T_max=80, the run 40 scheduler steps"):
        step(model, optimizer)


def test_without_a_total_a_schedule_may_begin_in_its_middle():
    model, optimizer, controller = in_the_middle(lambda o: LambdaLR(o, lambda i: 1 - i / 40))
    step(model, optimizer)
    assert controller.tau == 4


def test_a_run_that_takes_over_a_schedule_half_way_is_silent_where_they_fit():
    model, optimizer, controller = in_the_middle(lambda o: CosineAnnealingLR(o, 50), total=40)
    while not controller.done:
        step(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
