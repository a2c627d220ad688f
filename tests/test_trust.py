"""What used to be silent, or an error of another kind than promised: one test each."""

import copy
import pickle
import subprocess
import sys
import threading

import oracle
import pytest
import torch
from torch import nn

import anybatch
from anybatch._gradients import fingerprint


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def attached(model=None, **options):
    """A small model, its optimizer and its controller; every backward is one base batch."""
    model = oracle.make_model() if model is None else model
    optimizer = sgd(model)
    options = {} if {"scale", "base_batch"} & options.keys() else {"scale": "count"} | options
    return model, optimizer, anybatch.attach(optimizer, model=model, **options)


def backward(model, i=0, *, share=1.0):
    x, y = oracle.micro_batch(0, i)
    (oracle.loss_fn(model(x), y) * share).backward()


# ---- what attach is given ----


class WantsAMetric:
    last_epoch = 0

    def step(self, metric):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("model", None, "nn.Module"),
        ("process_group", 3, "ProcessGroup"),
        ("grad_scaler", object(), "GradScaler"),
        ("scheduler", WantsAMetric(), "needs an argument"),
        ("scale", 10**400, "positive, finite"),
        pytest.param("scale", 10**5000, "value of type int", id="an int of 5,000 digits"),
        ("scale", True, "positive, finite"),
        ("scale", "eight", "positive, finite"),
        ("reduction", None, "mean"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_at_attach(option, value, said):
    model = oracle.make_model()
    options = {"model": model, "scale": 2.0} | {option: value}
    with pytest.raises(anybatch.InvalidValueError, match=said):
        anybatch.attach(sgd(model), **options)
    anybatch.attach(sgd(model), model=model, scale=2.0)  # nothing of the failed one is left


def test_an_optimizer_without_a_learning_rate_is_refused():
    class Plain(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self):
            raise NotImplementedError

    model = oracle.make_model()
    with pytest.raises(anybatch.UnsupportedError, match="without a learning rate"):
        anybatch.attach(Plain(model.parameters()), model=model, scale=2, rule=anybatch.AdaScale(exponent=1))


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(anybatch.InvalidValueError, match="meta device"):
        anybatch.attach(sgd(model), model=model, scale=2)


@pytest.mark.parametrize(
    "said",
    [
        anybatch.Scaling(1.0, 0.0),
        anybatch.Scaling(float("nan"), 1.0),
        anybatch.Scaling(1.0, float("inf")),
        anybatch.Scaling(-1.0, 1.0),
        (1.0, 1.0),
    ],
    ids=str,
)
def test_what_a_rule_says_is_checked_before_anything_moves(said):
    class Mine(anybatch.Rule):
        def __call__(self, *, scale, gain, clock, exponent):
            return said if clock.tau else anybatch.Scaling(1.0, 1.0)

    model = oracle.make_model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale=2, rule=Mine())
    backward(model)
    optimizer.step()
    before = copy.deepcopy([list(model.parameters()), optimizer.state_dict()])
    with pytest.raises(anybatch.InvalidValueError, match=r"Mine.*returned"):
        optimizer.step()
    assert str([list(model.parameters()), optimizer.state_dict()]) == str(before)
    assert (controller.tau, controller.steps) == (1, 1)


def test_a_rate_that_was_set_after_a_step_that_raised_stays():
    class Fragile(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("a kernel failed")
            return super().step(closure)

    model = oracle.make_model()
    optimizer = Fragile([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.5)
    anybatch.attach(optimizer, model=model, scale=4.0, rule=anybatch.Linear())
    backward(model)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.025
    Fragile.fails = False
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025] + [0.1] * (len(optimizer.param_groups) - 1)


# ---- what a gradient may be ----


def test_conjugated_complex_gradients_are_measured():
    """A gradient may come with torch's lazy conjugation; its norm is that of its numbers."""
    weight = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128))
    model = nn.ParameterList([weight])
    optimizer = torch.optim.SGD([weight], lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count")
    x = torch.tensor([1 - 1j, 2 + 1j], dtype=torch.complex128)
    grads = []
    for factor in (1.0, 3.0):
        weight_grad = torch.autograd.grad((factor * (weight.conj() * x)).sum().real / 2, weight)[0]
        grads.append(weight_grad.resolve_conj())
        ((factor * (weight.conj() * x)).sum().real / 2).backward()
    optimizer.step()
    m1 = sum((2 * g).abs().square().sum().item() for g in grads) / 2
    m2 = sum(grads).abs().square().sum().item()
    assert controller.variance == pytest.approx(2 * (m1 - m2), rel=1e-12)


# ---- one window is one step ----


def trained(kind, *, raises=False):
    """State and weights after four steps of three micro-batches, each taken again after it raised where it does."""
    model = oracle.make_model()
    optimizer = kind(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, total=50, scale="count")
    for t in range(4):
        for i in range(3):
            backward(model, 3 * t + i, share=1 / 3)
        if raises:
            with pytest.raises(RuntimeError, match="a kernel failed"):
                optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    return controller.state_dict(), [p.tolist() for p in model.parameters()]


def test_a_step_that_calls_another_step_folds_its_window_once():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD(oracle.make_model().parameters(), lr=0.1)  # from now on the inner step() has hooks too
    assert trained(Twice) == trained(torch.optim.SGD)


def test_a_step_that_raised_and_is_taken_again_folds_its_window_once():
    class Fragile(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            self.fails = not self.fails
            if self.fails:
                raise RuntimeError("a kernel failed")
            return super().step(closure)

    assert trained(Fragile, raises=True) == trained(torch.optim.SGD)


def test_a_sum_over_micro_batches_steps_as_far_as_their_mean():
    ends = {}
    for reduction in ("mean", "sum"):
        for accumulation in (1, 8):
            weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
            optimizer = torch.optim.SGD([weight], lr=0.05)
            anybatch.attach(optimizer, model=nn.ParameterList([weight]), scale="count", reduction=reduction)
            for _ in range(10):
                for _ in range(accumulation):
                    (weight.square().sum() / (accumulation if reduction == "mean" else 1)).backward()
                optimizer.step()
                optimizer.zero_grad()
            ends[reduction, accumulation] = weight.detach()
    for end in ends.values():
        torch.testing.assert_close(end, torch.tensor([1.0, -2.0], dtype=torch.float64) * 0.9**10, rtol=1e-12, atol=0)


# ---- what is in .grad ----


def clear_to_none(optimizer):
    optimizer.zero_grad(set_to_none=True)


def clear_to_zero(optimizer):
    optimizer.zero_grad(set_to_none=False)


def replace(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)


def write_behind_the_version(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        if p.grad is not None:
            p.grad.data.zero_()


CLEARINGS = pytest.mark.parametrize("clear", [clear_to_none, clear_to_zero, replace, write_behind_the_version])


@CLEARINGS
def test_every_way_to_clear_gradients_is_seen(clear):
    model, optimizer, controller = attached()
    counts = []
    for t in range(6):
        backward(model, t, share=0.5)
        backward(model, t + 10, share=0.5)
        if t in (0, 3):  # thrown away, and done again
            clear(optimizer)
            backward(model, t, share=0.5)
            backward(model, t + 10, share=0.5)
        if t != 4:  # a step that a GradScaler skips is not called at all
            optimizer.step()
            counts.append(controller.count)
        clear(optimizer)
    assert counts == [2] * 5


@pytest.mark.parametrize("clear", [clear_to_none, clear_to_zero, replace])
def test_clearing_is_seen_without_a_look_too(clear, monkeypatch):
    """As on a device, where nothing looks at a gradient that seems untouched."""
    monkeypatch.setattr(fingerprint, "_on_host", lambda _: False)
    test_every_way_to_clear_gradients_is_seen(clear)


@CLEARINGS
def test_gradients_cleared_before_the_step_do_not_count(clear):
    model, optimizer, controller = attached()
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    backward(model)
    clear(optimizer)
    with pytest.warns(anybatch.AnybatchWarning, match="cleared between the last backward"):
        optimizer.step()
    assert (controller.tau, controller.steps, controller.skipped) == (1, 1, 1)
    backward(model)
    optimizer.step()
    assert (controller.tau, controller.steps) == (2, 2)


@pytest.mark.parametrize("dropped", [0, 1, 2, 3])
@pytest.mark.parametrize("early", [False, True], ids=["before the step", "after each micro-batch"])
@pytest.mark.parametrize("to_none", [True, False])
def test_one_gradient_that_is_dropped_is_no_clearing(dropped, early, to_none):
    """DINO drops that of its last layer for an epoch, whose parameter is the first to get one in a backward."""
    model, optimizer, controller = attached()
    parameter = list(model.parameters())[dropped]
    drop = lambda: setattr(parameter, "grad", None if to_none else torch.zeros_like(parameter))  # noqa: E731
    before = parameter.detach().clone()
    for t in range(4):
        for i in range(3):
            backward(model, 10 * t + i, share=1 / 3)
            if early or i == 2:
                drop()
        optimizer.step()
        optimizer.zero_grad()
        assert controller.count == 3
    assert (controller.steps, controller.skipped) == (4, 0)
    assert torch.equal(parameter, before)


def test_gradients_from_before_attach_are_an_error():
    model = oracle.make_model()
    backward(model)
    optimizer = sgd(model)
    anybatch.attach(optimizer, model=model, scale="count")
    with pytest.raises(anybatch.UsageError, match="from before attach"):
        backward(model, 1)


def test_gradients_from_before_attach_may_be_cleared():
    model = oracle.make_model()
    backward(model)
    _, optimizer, controller = attached(model)
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()
    assert controller.count == 1


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_gradients_that_a_paused_backward_left_are_an_error(when):
    model, optimizer, controller = attached()

    def stray():
        with controller.paused():
            backward(model, 5)

    def window():
        if when == "before":
            stray()
        backward(model, 0)
        if when == "between":
            stray()
        backward(model, 1)
        if when == "after":
            stray()
        optimizer.step()

    with pytest.raises(anybatch.UsageError, match=r"from a backward in controller\.paused"):
        window()


def test_gradients_that_were_put_back_after_a_paused_backward_are_fine():
    model, optimizer, controller = attached()
    backward(model, 0, share=0.5)
    with controller.paused():
        kept = [p.grad.clone() for p in model.parameters()]
        backward(model, 5)
        for p, k in zip(model.parameters(), kept, strict=True):
            p.grad.copy_(k)
    backward(model, 1, share=0.5)
    optimizer.step()
    assert controller.count == 2


def test_a_hook_of_the_users_that_comes_later_is_measured():
    """A tenth of every gradient: a hundredth of both moments, and not a gain of S."""
    moments = []
    for factor in (None, 0.1):
        model, optimizer, controller = attached(rule=anybatch.AdaScale(smoothing=0.0))
        if factor is not None:
            for p in model.parameters():
                p.register_hook(lambda g: g * factor)
        for _ in range(3):
            for i in range(4):
                backward(model, i, share=0.25)
            with torch.no_grad():
                kept = [p.clone() for p in model.parameters()]
            optimizer.step()
            with torch.no_grad():
                for p, k in zip(model.parameters(), kept, strict=True):
                    p.copy_(k)
            optimizer.zero_grad()
        moments.append((controller.variance, controller.sqnorm))
    assert [100 * m for m in moments[1]] == pytest.approx(moments[0], rel=1e-9)


def test_parameters_that_were_replaced_after_attach_are_an_error():
    model, optimizer, controller = attached()
    model.load_state_dict(oracle.make_model(1).state_dict(), assign=True)
    backward(model)
    with pytest.raises(anybatch.UsageError, match="replaced after attach"):
        optimizer.step()
    assert controller.steps == 0


def test_several_backwards_are_one_micro_batch():
    """Against explicit sums of gradients; a parameter that only one of the two losses reaches is in it as well."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(6, 4), nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
    model = nn.ModuleList([trunk, heads]).double()
    optimizer = sgd(model)
    controller = anybatch.attach(optimizer, model=model, scale="count", rule=anybatch.AdaScale(smoothing=0.0))
    parameters = list(model.parameters())

    def losses(i):
        x, y = oracle.micro_batch(0, i)
        return [oracle.loss_fn(head(torch.tanh(trunk(x))), y) for head in heads]

    samples = []
    for i in range(3):
        grads = torch.autograd.grad(sum(losses(i)), parameters)
        samples.append(torch.cat([g.flatten() for g in grads]))
    mean = sum(samples) / 3
    variance = sum((s - mean).square().sum() for s in samples) / 2
    for i in range(3):
        with controller.together():
            for loss in losses(i):
                (loss / 3).backward()
    optimizer.step()
    assert controller.count == 3
    assert controller.variance == pytest.approx(variance.item(), rel=1e-12)
    assert controller.sqnorm == pytest.approx((mean.square().sum() - variance / 3).item(), rel=1e-12)


def test_a_micro_batch_that_failed_between_its_backwards_is_not_measured():
    model, optimizer, controller = attached()
    with pytest.raises(RuntimeError, match="no more data"), controller.together():
        backward(model)
        raise RuntimeError("no more data")
    optimizer.zero_grad()
    for i in range(2):
        backward(model, i, share=0.5)
    optimizer.step()
    assert (controller.count, controller.steps) == (2, 1)


def test_two_controllers_train_a_generator_and_a_discriminator():
    """A DCGAN's loop: the discriminator's real and fake loss are one micro-batch, and the generator's backward, which
    goes through the discriminator, is none of its."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    discriminator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    pairs = []
    for net in (generator, discriminator):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        pairs.append((optimizer, anybatch.attach(optimizer, model=net, base_batch=8, micro_batch=8)))
    (optimizer_g, controller_g), (optimizer_d, controller_d) = pairs
    score = nn.BCEWithLogitsLoss()
    for _ in range(3):
        optimizer_d.zero_grad()
        for _ in range(4):
            real, fake = torch.randn(8, 3) + 2, generator(torch.randn(8, 2)).detach()
            with controller_d.together():
                (score(discriminator(real), torch.ones(8, 1)) / 4).backward()
                (score(discriminator(fake), torch.zeros(8, 1)) / 4).backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        for _ in range(4):
            with controller_d.paused():
                (score(discriminator(generator(torch.randn(8, 2))), torch.ones(8, 1)) / 4).backward()
        optimizer_g.step()
    for controller in (controller_g, controller_d):
        assert (controller.steps, controller.count, controller.scale) == (3, 4, 4)
        assert 3 <= controller.tau <= 12


# ---- numbers and threads ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_observed_gradients_keep_their_digits(dtype):
    """Long rows, and numbers whose squares a half cannot hold; against float64."""
    torch.manual_seed(0)
    samples = (300 + torch.randn(4, 3, 70_000)).to(dtype)
    weight = nn.Parameter(torch.zeros(3, 70_000, dtype=dtype))
    model = nn.ParameterList([weight])
    rule = anybatch.AdaScale(smoothing=0.0)
    controller = anybatch.attach(sgd(model), model=model, scale="count", rule=rule)
    controller.observe([samples])
    window = controller._gradients.window()
    exact = samples.double().square().sum().item() / 16
    # Torch adds up a half's squares one after the other, a float's in several lanes.
    assert window.norms["euclidean"].samples.item() == pytest.approx(
        exact, rel=1e-8 if dtype == torch.float32 else 1e-6
    )


def test_two_backwards_at_once_are_an_error():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = sgd(model)
    anybatch.attach(optimizer, model=model, scale="count")
    first_waits, second_is_in = threading.Event(), threading.Event()

    def wait(grad):
        if threading.current_thread() is not threading.main_thread():
            first_waits.set()
            second_is_in.wait(10)
        return grad

    errors = []

    def run():
        x = torch.randn(2, 4)
        middle = model[1](model[0](x))
        middle.register_hook(wait)
        try:
            model[2](middle).sum().backward()
        except anybatch.UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert first_waits.wait(10)
    model(torch.randn(2, 4)).sum().backward()
    second_is_in.set()
    thread.join()
    assert "Two backwards run at once" in str(errors[0])


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_controller_cannot_be_copied(how):
    _, _, controller = attached()
    with pytest.raises(anybatch.UsageError, match="cannot be copied or pickled"):
        how(controller)


COMPILED = """
import torch, anybatch
model = torch.nn.Linear(6, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
anybatch.attach(optimizer, model=model, scale="count")
with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
    model(torch.randn(2, 6)).sum().backward()
optimizer.step()
"""


def test_compiled_autograd_is_an_error():
    """In a process of its own: it changes dynamo's state for good."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=120, check=False)
    assert "UsageError" in done.stderr
    assert "compiled autograd" in done.stderr
