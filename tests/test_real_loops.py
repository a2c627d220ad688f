"""What loops of real scripts do beside the plain one: leave, replace, interrupt, clip and shorten."""

import contextlib
import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn

import anybatch

SIZES = {"base_batch": 8, "micro_batch": 8}


def regression(width=8):
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(width, 1), "b": nn.Linear(width, 1)}).double()


def loss_of(model, g, names=("a", "b")):
    x = torch.randn(8, 8, generator=g, dtype=torch.float64)
    return sum((model[name](x) - x.sum(1, keepdim=True)).square().mean() for name in names)


def train(model, optimizer, g, steps, n=4, names=("a", "b")):
    for _ in range(steps):
        for _ in range(n):
            (loss_of(model, g, names) / n).backward()
        optimizer.step()
        model.zero_grad()


# ---- parameters that leave ----


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("how", ["group", "list"])
def test_what_has_left_the_optimizer_is_not_measured(when, how):
    """Its layer still gets gradients. The averages are those of a run that never had it, from the same step on."""
    found = []
    for left in (False, True):
        model = regression()
        groups = [{"params": list(model[name].parameters())} for name in "ab"]
        optimizer = torch.optim.SGD(groups, lr=0.0)
        rule = anybatch.AdaScale(smoothing=0.0)  # the last step alone
        controller = anybatch.attach(optimizer, model=model, rule=rule, **SIZES)
        g = torch.Generator().manual_seed(1)
        if when:
            train(model, optimizer, g, when)
        if how == "group":
            del optimizer.param_groups[1]
        else:
            optimizer.param_groups[1]["params"].clear()
        train(model, optimizer, g, 3, names="ab" if left else "a")
        found.append((controller.variance, controller.sqnorm, controller.steps))
    assert found[1] == pytest.approx(found[0], rel=1e-12)
    assert found[0][2] == when + 3


@pytest.mark.parametrize("backward_first", [False, True])
def test_replaced_tensors_are_freed_and_the_run_goes_on(backward_first):
    """As Gaussian splatting's densification does: all tensors at once, before a window or within it."""
    model = nn.ParameterDict({name: nn.Parameter(torch.randn(16, 3)) for name in ("means", "colours")})
    optimizers = {name: torch.optim.Adam([p], lr=1e-2) for name, p in model.items()}
    old = []
    controller = anybatch.attach(list(optimizers.values()), model=model, total=2000, base_batch=1, micro_batch=3)

    def backward():
        for _ in range(4):
            ((sum(model.values()).mean(0) - torch.randn(3)).square().sum() / 4).backward()

    def grow():
        for name, optimizer in optimizers.items():
            before = model[name]
            state = optimizer.state.pop(before)
            after = nn.Parameter(torch.cat([before.detach(), before.detach()[:4]]))
            if before.grad is not None:
                after.grad = torch.cat([before.grad, before.grad[:4]])
            old.append(weakref.ref(before))
            model[name] = after
            optimizer.param_groups[0]["params"] = [after]
            optimizer.state[after] = {
                key: value if key == "step" else torch.cat([value, value[:4] * 0]) for key, value in state.items()
            }

    counts = []
    for step in range(9):
        backward()
        if backward_first and step % 3 == 2:
            grow()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        counts.append(controller.count)
        if not backward_first and step % 3 == 2:
            grow()
    gc.collect()
    assert (controller.steps, controller.skipped, set(counts)) == (9, 0, {4})
    assert len(old) == 6
    assert not any(each() is not None for each in old)
    assert 0 < controller.tau < math.inf


@pytest.mark.parametrize("frozen_at_first", [False, True])
def test_a_run_that_unfroze_layers_is_resumed(frozen_at_first):
    def build(unfrozen):
        model = regression()
        model["b"].requires_grad_(unfrozen)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, anybatch.attach(optimizer, model=model, total=200, **SIZES)

    g = torch.Generator().manual_seed(1)
    model, optimizer, controller = build(not frozen_at_first)
    train(model, optimizer, g, 4)
    model["b"].requires_grad_(frozen_at_first)
    train(model, optimizer, g, 4)
    model2, optimizer2, resumed = build(True)
    model2.load_state_dict(model.state_dict())
    optimizer2.load_state_dict(optimizer.state_dict())
    assert resumed.tau == controller.tau
    train(model2, optimizer2, g, 1)
    assert resumed.steps == 9


# ---- loops that are left ----


@pytest.mark.parametrize("then", ["parts", "step"])
@pytest.mark.parametrize("cleared", [False, True])
def test_a_loop_over_parts_that_was_left(then, cleared):
    model, x = nn.Linear(20, 1), torch.randn(64, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = anybatch.attach(optimizer, model=model, total=200, **SIZES)

    def whole():
        for part, share in controller.parts(x, 8):
            (model(part).square().mean() * share).backward()
        optimizer.step()
        optimizer.zero_grad()

    for n, (part, share) in enumerate(controller.parts(x, 8)):
        if n == 3:
            break
        (model(part).square().mean() * share).backward()
    if cleared:
        optimizer.zero_grad()
    else:
        with pytest.raises(anybatch.UsageError, match=r"left at part 4 of 8.*zero_grad"):
            whole() if then == "parts" else optimizer.step()
        optimizer.zero_grad()  # the way out that the error names
    whole()
    assert (controller.steps, controller.scale) == (1, 8)


def test_an_interrupt_between_the_steps_of_two_optimizers_is_a_step_of_none():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.01), torch.optim.AdamW(model[1].parameters(), lr=0.01)]
    controller = anybatch.attach(optimizers, model=model, scale="count", total=100)

    def window():
        for x in torch.randn(2, 4, 4):
            (model(x).square().mean() / 2).backward()

    def step():
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    window()
    step()
    window()
    optimizers[0].step()  # and here the interrupt
    model.zero_grad()
    window()
    with pytest.warns(anybatch.AnybatchWarning, match="this step does not count"):
        step()
    window()
    step()
    assert (controller.steps, controller.skipped) == (3, 1)


def test_a_step_that_is_never_called_is_warned_of():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    anybatch.attach(optimizer, model=model, scale="count", total=100)

    def window():
        model(torch.randn(4, 4)).square().mean().backward()
        optimizer.zero_grad()

    for _ in range(10):
        window()
    with pytest.warns(anybatch.AnybatchWarning, match="10 windows in a row were cleared"):
        window()
    window()


class Raises(torch.autograd.Function):
    """Raises in its backward, once."""

    broken = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if Raises.broken:
            raise ZeroDivisionError
        return grad


@pytest.mark.parametrize("cleared", [False, True])
def test_a_backward_that_raised_half_way(cleared):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = anybatch.attach(optimizer, model=model, scale="count", total=100)

    def backward():
        model[1](Raises.apply(model[0](torch.randn(4, 4)))).square().mean().backward()

    backward()
    Raises.broken = True
    with pytest.raises(ZeroDivisionError):
        backward()
    Raises.broken = False
    if not cleared:
        backward()
        with pytest.raises(anybatch.UsageError, match=r"raised half way.*zero_grad"):
            optimizer.step()
    optimizer.zero_grad()  # the way out that the error names
    backward()
    backward()
    optimizer.step()
    assert (controller.steps, controller.count) == (1, 2)


# ---- sizes ----


@pytest.mark.parametrize("first", [64, 128])
@pytest.mark.parametrize("unit", [1, 7])
def test_parts_of_a_shorter_batch_count_as_less(first, unit):
    """Examples, or tokens of which each example has 7."""
    model = nn.Linear(50, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sizes = {"base_batch": 16 * unit, "micro_batch": first // 4 * unit}
    controller = anybatch.attach(optimizer, model=model, total=1000, **sizes)
    for rows in (first, 20, first, 36):
        for part, share in controller.parts(torch.randn(rows, unit, 50), 4):
            (model(part).square().mean() * share).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert controller.scale == pytest.approx(rows / 16, rel=1e-12)
    controller.micro_batch = 5 * unit  # said by hand, it is not changed
    for part, share in controller.parts(torch.randn(first, unit, 50), 4):
        (model(part).square().mean() * share).backward()
    optimizer.step()
    assert controller.scale == pytest.approx(20 / 16, rel=1e-12)


# ---- sums that are clipped ----


@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), (8, 8), ("mean", None)])
def test_a_clip_sees_the_mean_whatever_the_accumulation(n, reduction, divisor):
    """Against the clip of the plain mean."""
    g = torch.Generator().manual_seed(n)
    model = regression()
    data = [torch.randn(8, 8, generator=g, dtype=torch.float64) for _ in range(n)]
    losses = lambda: [(model["a"](x) - 5 * x.sum(1, keepdim=True)).square().mean() for x in data]  # noqa: E731
    grads = [torch.autograd.grad(loss, list(model["a"].parameters())) for loss in losses()]
    mean = torch.cat([sum(each).flatten() / n for each in zip(*grads)])
    optimizer = torch.optim.SGD(model["a"].parameters(), lr=0.0)
    controller = anybatch.attach(optimizer, model=model, scale="count", reduction=reduction)
    for loss in losses():
        (loss / (divisor or n)).backward()
    controller.mean_gradients()
    norm = torch.nn.utils.clip_grad_norm_(model["a"].parameters(), 0.5)
    assert float(norm) == pytest.approx(float(mean.norm()), rel=1e-12)
    optimizer.step()
    clipped = torch.cat([p.grad.flatten() for p in model["a"].parameters()])
    torch.testing.assert_close(clipped, mean * 0.5 / mean.norm(), rtol=1e-5, atol=0)
    assert controller.variance == pytest.approx(variance_of(grads), rel=1e-9)


def variance_of(grads):
    flat = [torch.cat([g.flatten() for g in each]) for each in grads]
    mean = sum(flat) / len(flat)
    return sum(float((each - mean).square().sum()) for each in flat) / (len(flat) - 1)


@pytest.mark.parametrize(("n", "reduction", "said"), [(4, "sum", 1), (4, 4, 0), (3, 4, 1), (4, "mean", 0)])
def test_a_clip_of_a_sum_is_warned_of(n, reduction, said):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    anybatch.attach(optimizer, model=model, scale="count", reduction=reduction)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for x in torch.randn(n, 4, 4):
                model(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert sum("controller.mean_gradients() before the clip" in str(each.message) for each in caught) == said


# ---- steps that are not training ----


@pytest.mark.parametrize("options", [{}, {"rule": anybatch.Linear(), "scale": 2}], ids=["measured", "fixed"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_while_paused_is_the_bare_optimizers(make, options):
    """A penalty at each second step, as a lazy regulariser's; the oracle takes the same steps by hand."""
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(8, 1).double()
    optimizer = make(model.parameters(), lr=0.01)
    controller = anybatch.attach(optimizer, model=model, total=1000, **({} if "scale" in options else SIZES), **options)
    for t in range(6):
        for _ in range(2):
            x = torch.randn(8, 8, generator=g, dtype=torch.float64)
            ((model(x) - x.sum(1, keepdim=True)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = (controller.tau, controller.steps, controller.skipped, controller.variance)
        weights = [p.detach().clone() for p in model.parameters()]
        if t % 2:
            with controller.paused():
                (model.weight.square().sum() + model.bias.square().sum()).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert (controller.tau, controller.steps, controller.skipped) == before[:3]
            assert controller.variance == before[3] or math.isnan(before[3])
            for p, weight in zip(model.parameters(), weights, strict=True):
                if make is torch.optim.SGD:
                    torch.testing.assert_close(p.detach(), weight - 0.01 * 2 * weight, rtol=1e-12, atol=1e-15)
                else:
                    assert not torch.equal(p.detach(), weight)
    assert (controller.steps, controller.skipped) == (6, 0)


DCGAN = ["the usual order", "as the error says", "paused and not cleared"]


@pytest.mark.parametrize("case", DCGAN)
def test_a_generators_loss_through_the_discriminator(case):
    """The usual script is an error that names the way out; the discriminator's noise is that of its own loss alone."""
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.0) for net in (generator, discriminator)]
    rule = anybatch.AdaScale(smoothing=0.0)
    first = anybatch.attach(optimizers[0], model=generator, rule=rule, total=50, **SIZES)
    second = anybatch.attach(optimizers[1], model=discriminator, rule=rule, total=first.clock, **SIZES)
    real = torch.randn(2, 2, 8, 2, dtype=torch.float64)
    expected = []
    for part in real:
        each = [torch.autograd.grad(discriminator(x).square().mean(), list(discriminator.parameters())) for x in part]
        each = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each])
        expected.append(float(each.var(0).sum()))  # two samples of one base batch

    def iteration(t):
        for x in real[t]:
            (discriminator(x).square().mean() / 2).backward()
        optimizers[1].step()
        if case != "the usual order":
            optimizers[1].zero_grad()
        for _ in range(2):
            x = torch.randn(8, 2, dtype=torch.float64)
            with contextlib.nullcontext() if case == "the usual order" else second.paused():
                (discriminator(generator(x)).square().mean() / 2).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        if case == "as the error says":
            optimizers[1].zero_grad()

    if case == "the usual order":
        with pytest.raises(anybatch.UsageError, match=r"generator's through.*controller.paused\(\)"):
            iteration(0)
        return
    iteration(0)
    before = first.tau
    if case == "paused and not cleared":
        with pytest.raises(anybatch.UsageError, match=r"a backward in controller.paused\(\).*zero_grad"):
            iteration(1)
        return
    iteration(1)
    assert second.variance == pytest.approx(expected[1], rel=1e-9)
    assert first.tau == second.tau == first.clock.tau
    assert first.steps == second.steps == 2
    assert first.tau == before + first.gain  # the discriminator's own gain moves no clock


# ---- what is not finite ----


RULES = {"AdaScale": anybatch.AdaScale, "Linear": anybatch.Linear, "SquareRoot": anybatch.SquareRoot}


@pytest.mark.parametrize("scale", [1, 4, "count"])
@pytest.mark.parametrize("rule", [*RULES, "Identity"])
def test_a_gradient_that_is_not_finite_moves_nothing_with_one_backward_either(rule, scale):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = RULES.get(rule, anybatch.Identity)()
    controller = anybatch.attach(optimizer, model=model, rule=rule, scale=scale, total=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(3):
            x = torch.randn(8, 3)
            if t == 1:
                x[0, 0] = math.inf
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert model.weight.isfinite().all()
    assert (controller.steps, controller.skipped) == (2, 1)


@pytest.mark.parametrize("value", [1e30, 3e38])
def test_a_large_finite_gradient_is_a_step_of_a_fixed_rule(value):
    """Its squared norm overflows in float32."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1e-38)
    controller = anybatch.attach(optimizer, model=nn.ParameterList([parameter]), rule=anybatch.Linear(), scale=1)
    parameter.grad = torch.full((2,), value)
    optimizer.step()
    assert (controller.steps, controller.skipped) == (1, 0)


def test_an_embedding_with_sparse_gradients_is_checked_too():
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, rule=anybatch.Linear(), scale=2, total=10)
    for factor in (1.0, math.nan, 1.0):
        (model(torch.tensor([1, 1, 3])).sum() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.weight.isfinite().all()
    assert (controller.steps, controller.skipped) == (2, 1)
