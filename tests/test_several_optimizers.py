"""One controller over several optimizers of one model: one window, one gain, one clock."""

import copy

import oracle
import pytest
import torch
from torch import nn

import anybatch


def train(model, optimizers, controller, steps, *, n=3, clear_between=False):
    seen = []
    for t in range(steps):
        for i in range(n):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(model(x), y) / n).backward()
        for optimizer in optimizers:
            optimizer.step()
            if clear_between:
                optimizer.zero_grad()
        for optimizer in optimizers:
            optimizer.zero_grad()
        seen.append((controller.gain, controller.tau))
    return seen


@pytest.mark.parametrize("clear_between", [False, True])
def test_two_halves_are_the_whole(clear_between):
    """The parameters of one SGD in two: the same weights to the last bit, and the same clock."""
    runs = []
    for parts in (1, 2):
        model = oracle.make_model()
        parameters = list(model.parameters())
        groups = [parameters] if parts == 1 else [parameters[:2], parameters[2:]]
        optimizers = [torch.optim.SGD(group, lr=0.05, momentum=0.9) for group in groups]
        schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100) for optimizer in optimizers]
        controller = anybatch.attach(optimizers, model=model, scheduler=schedulers, total=100, scale="count")
        seen = train(model, optimizers, controller, 8, clear_between=clear_between)
        assert controller.steps == 8
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        runs.append((seen, set(rates), [p.tolist() for p in model.parameters()]))
    assert runs[0] == runs[1]


OVERFLOWS = (2, 3, 5)


def under_a_loss_scale(*, order, overflows=None, update_after_each=False, **options):
    """Gains and weights of steps of several optimizers, at some of which the gradient of one's part is inf."""
    model, wrong = oracle.make_model(), [False]
    parts = [list(model.parameters())[i :: len(order)] for i in range(len(order))]
    if overflows is not None:
        parts[overflows][0].register_hook(lambda grad: grad * torch.inf if wrong[0] else grad)
    optimizers = [torch.optim.SGD(part, lr=0.05, momentum=0.9) for part in parts]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    controller = anybatch.attach(optimizers, model=model, grad_scaler=scaler, **{"scale": "count", **options})
    gains = []
    for t in range(8):
        wrong[0] = t in OVERFLOWS
        if wrong[0] and overflows is None:
            continue
        for i in range(3):
            x, y = oracle.micro_batch(t, i)
            scaler.scale(oracle.loss_fn(model(x), y) / 3).backward()
        for place in order:
            scaler.step(optimizers[place])
            if update_after_each:
                scaler.update()
        if not update_after_each:
            scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        gains.append(controller.gain)
    return controller, gains, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("update_after_each", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2)])
@pytest.mark.parametrize("overflows", [0, 1])
def test_an_overflow_that_one_of_them_saw_is_a_step_of_none(order, overflows, update_after_each):
    """A GradScaler skips each optimizer for itself; Lightning and Accelerate update it after each."""
    options = {"order": order, "overflows": overflows, "update_after_each": update_after_each}
    controller, gains, weights = under_a_loss_scale(**options)
    _, others, undisturbed = under_a_loss_scale(order=order)
    assert (controller.steps, controller.skipped) == (5, 3)
    assert [gain for t, gain in enumerate(gains) if t not in OVERFLOWS] == pytest.approx(others, rel=1e-12)
    torch.testing.assert_close(weights, undisturbed, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": anybatch.Linear()},
        {"rule": anybatch.Linear(), "scale": 3},
        {"rule": anybatch.AdaScale(every=4)},
        {"rule": anybatch.AdaScale(every=4), "update_after_each": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("overflows", [0, 1])
def test_such_a_step_does_not_count_where_nobody_looked_at_its_gradient(options, overflows):
    controller, *_ = under_a_loss_scale(order=(0, 1), overflows=overflows, **options)
    assert (controller.steps, controller.skipped) == (5, 3)


def test_each_has_the_rate_of_its_class():
    """Muon for the matrices, AdamW for the rest: r to the power of each, and one noise factor, the more careful one."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    muon, adamw = torch.optim.Muon(matrices, lr=0.02, momentum=0.0), torch.optim.AdamW(others, lr=0.001)
    controller = anybatch.attach([muon, adamw], model=model, total=100, scale="count")
    rates = {}
    for optimizer in (muon, adamw):
        # After the controller's own hook, so that it sees what the step sees.
        optimizer.register_step_pre_hook(lambda o, *_: rates.update({o: o.param_groups[0]["lr"]}))
    train(model, (muon, adamw), controller, 5)
    assert controller.gain > 1.1
    assert rates[muon] == pytest.approx(0.02 * controller.gain**0.5)
    assert rates[adamw] == pytest.approx(0.001 * controller.gain**0.5)
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.02, 0.001)
    gain = anybatch.gain(controller.variance, controller.sqnorm, 3)
    assert controller.gain == pytest.approx(gain ** (1 - 2**-3))  # the fifth of the first gains


def test_a_window_is_one_step_of_each():
    model = oracle.make_model()
    parameters = list(model.parameters())
    first, second = (torch.optim.SGD(half, lr=0.1) for half in (parameters[:2], parameters[2:]))
    controller = anybatch.attach([first, second], model=model, scale="count")
    x, y = oracle.micro_batch(0, 0)
    oracle.loss_fn(model(x), y).backward()
    first.step()
    assert controller.steps == 0
    with pytest.raises(anybatch.UsageError, match="another optimizer of the same controller has not"):
        first.step()
    second.step()
    assert controller.steps == 1


def test_a_backward_between_the_steps_of_two_is_an_error():
    """As in a GAN, whose halves have losses of their own."""
    model = oracle.make_model()
    parameters = list(model.parameters())
    first, second = (torch.optim.SGD(half, lr=0.1) for half in (parameters[:2], parameters[2:]))
    anybatch.attach([first, second], model=model, scale="count")
    x, y = oracle.micro_batch(0, 0)
    oracle.loss_fn(model(x), y).backward()
    first.step()
    oracle.loss_fn(model(x), y).backward()
    with pytest.raises(anybatch.UsageError, match="need a controller each"):
        second.step()


def test_what_does_not_count_does_not_count_for_any():
    model = oracle.make_model()
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD(half, lr=0.1) for half in (parameters[:2], parameters[2:])]
    controller = anybatch.attach(optimizers, model=model, scale="count")
    for i in range(2):
        x, y = oracle.micro_batch(0, i)
        (oracle.loss_fn(model(x), y) * float("inf")).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert (controller.steps, controller.skipped, controller.tau) == (0, 1, 0)


def test_resuming_and_detaching():
    def build():
        model = oracle.make_model()
        parameters = list(model.parameters())
        optimizers = [torch.optim.SGD(half, lr=0.05, momentum=0.9) for half in (parameters[:2], parameters[2:])]
        return model, optimizers, anybatch.attach(optimizers, model=model, total=100, scale="count")

    model, optimizers, controller = build()
    train(model, optimizers, controller, 4)
    saved = copy.deepcopy([part.state_dict() for part in (model, *optimizers, controller)])
    twin, twins, resumed = build()
    for part, state in zip((twin, *twins, resumed), saved, strict=True):
        part.load_state_dict(state)
    assert train(twin, twins, resumed, 3) == train(model, optimizers, controller, 3)
    controller.detach()
    for optimizer in optimizers:
        anybatch.attach(optimizer, model=model, scale=1).detach()


@pytest.mark.parametrize("given", [[], "SGD", None, [None]])
def test_what_is_no_optimizer_is_refused(given):
    with pytest.raises(anybatch.InvalidValueError):
        anybatch.attach(given, model=oracle.make_model(), scale=2)


def test_one_twice_and_adams_metric_are_refused():
    model = oracle.make_model()
    one = torch.optim.AdamW(list(model.parameters())[:2])
    with pytest.raises(anybatch.InvalidValueError, match="each once"):
        anybatch.attach([one, one], model=model, scale=2)
    two = torch.optim.AdamW(list(model.parameters())[2:])
    with pytest.raises(anybatch.UnsupportedError, match="one optimizer"):
        anybatch.attach([one, two], model=model, scale=2, rule=anybatch.AdaScale(metric="adam"))
    anybatch.attach([one, two], model=model, scale=2)
    with pytest.raises(anybatch.UsageError, match="has a controller already"):
        anybatch.attach(two, model=model, scale=2)
