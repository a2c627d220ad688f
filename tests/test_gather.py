"""What a window is: how backwards are counted, and whose gradients are measured."""

import oracle
import pytest
import torch
from common import Fails
from torch import nn
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch._gradients import GradientHooks


def attached(model, parameters=None, lr=0.0, **options):
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=lr)
    options = options or {"scale": "count"}
    options.setdefault("rule", anybatch.AdaScale(smoothing=0.0))
    return optimizer, anybatch.attach(optimizer, model=model, **options)


def brute_force(model, losses, parameters=None):
    """Variance and squared mean of one micro-batch's gradient, by a plain loop."""
    parameters = [p for p in (parameters or model.parameters()) if p.requires_grad]
    grads = []
    for loss in losses:
        g = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        grads.append([torch.zeros_like(p) if d is None else d for d, p in zip(g, parameters, strict=True)])
    n = len(grads)
    mean = [sum(g[k] for g in grads) / n for k in range(len(parameters))]
    deviation = sum(oracle.norm2([a - b for a, b in zip(g, mean, strict=True)]) for g in grads) / (n - 1)
    return deviation, oracle.norm2(mean) - deviation / n


def losses_of(model, n=3, forward=None):
    for i in range(n):
        x, y = oracle.micro_batch(0, i)
        yield oracle.loss_fn((forward or model)(x), y)


def test_frozen_and_foreign_parameters_do_not_count():
    """Two optimizers on one model: each controller measures the parameters of its own."""
    model = oracle.make_model()
    model[0].bias.requires_grad_(False)
    halves = [[model[0].weight], list(model[2].parameters())]
    pairs = [attached(model, half) for half in halves]
    for loss in losses_of(model):
        (loss / 3).backward()
    for (optimizer, controller), half in zip(pairs, halves, strict=True):
        optimizer.step()
        variance, sqnorm = brute_force(model, losses_of(model), half)
        assert (controller.variance, controller.sqnorm) == pytest.approx((variance, max(sqnorm, 0)))


def test_paused_backwards_are_not_training():
    model = oracle.make_model()
    optimizer, controller = attached(model)
    for i, loss in enumerate(losses_of(model)):
        (loss / 3).backward()
        if i == 0:
            with controller.paused():
                kept = [p.grad.clone() for p in model.parameters()]
                (100 * next(losses_of(model))).backward()
                for p, g in zip(model.parameters(), kept, strict=True):
                    p.grad.copy_(g)
    optimizer.step()
    assert controller.count == 3
    assert controller.variance == pytest.approx(brute_force(model, losses_of(model))[0])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("thrown", [1, 2])
def test_a_window_thrown_away_is_not_counted(set_to_none, measure, thrown):
    model = oracle.make_model()
    rule = anybatch.AdaScale(smoothing=0.0) if measure else anybatch.Linear()
    optimizer, controller = attached(model, scale="count", rule=rule)
    for _ in range(2):
        for _ in range(thrown):
            x, y = oracle.micro_batch(7, 7)
            oracle.loss_fn(model(x), y).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        for loss in losses_of(model):
            (loss / 3).backward()
        optimizer.step()
        assert controller.count == controller.scale == 3
        if measure:
            assert controller.variance == pytest.approx(brute_force(model, losses_of(model))[0])
        optimizer.zero_grad(set_to_none=set_to_none)


def test_a_backward_that_raised_is_not_counted():
    model = oracle.make_model()
    optimizer, controller = attached(model)
    x, y = oracle.micro_batch(0, 0)
    with pytest.raises(ZeroDivisionError):  # after the last layer's gradients, before the first's
        oracle.loss_fn(model[2](Fails.apply(model[1](model[0](x)))), y).backward()
    optimizer.zero_grad()
    for loss in losses_of(model):
        (loss / 3).backward()
    optimizer.step()
    assert controller.count == 3
    assert controller.variance == pytest.approx(brute_force(model, losses_of(model))[0])


def test_gradients_kept_from_the_step_before_are_an_error():
    model = oracle.make_model()
    optimizer, _ = attached(model)
    next(losses_of(model)).backward()
    optimizer.step()
    with pytest.raises(anybatch.UsageError, match="zero_grad"):
        next(losses_of(model)).backward()


def test_trap_autograd_grad_fires_the_hooks_and_is_not_counted():
    model = oracle.make_model()
    optimizer, controller = attached(model)
    torch.autograd.grad(next(losses_of(model)), list(model.parameters()))
    for loss in losses_of(model):
        torch.autograd.grad(100 * next(losses_of(model)), list(model.parameters()))
        (loss / 3).backward()
    torch.autograd.grad(next(losses_of(model)), list(model.parameters()))
    optimizer.step()
    assert controller.count == 3
    assert controller.variance == pytest.approx(brute_force(model, losses_of(model))[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_trap_checkpointed_backwards_are_counted_once(use_reentrant, outside):
    """Re-entrant checkpointing runs the engine from inside of the engine, for each segment."""
    model = nn.Sequential(*(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3)), nn.Linear(6, 3).double())
    segments = [model[:1], model[1:3], model[3:]]

    def forward(x):
        x = x.requires_grad_()
        for segment in segments[:-1] if outside else segments:
            x = checkpoint(segment, x, use_reentrant=use_reentrant)
        return segments[-1](x) if outside else x

    optimizer, controller = attached(model)
    for loss in losses_of(model, forward=forward):
        (loss / 3).backward()
    optimizer.step()
    assert controller.count == 3
    assert controller.variance == pytest.approx(brute_force(model, losses_of(model))[0])


def test_trap_a_layer_shared_by_reentrant_checkpoints_is_refused():
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64))
    optimizer, _ = attached(model)
    for i in range(2):
        x, y = oracle.micro_batch(0, i)
        h = checkpoint(model[0], x.requires_grad_(), use_reentrant=True)
        h = checkpoint(model[0], h, use_reentrant=True)
        (oracle.loss_fn(model[1](h), y) / 2).backward()
    with pytest.raises(anybatch.UsageError, match="use_reentrant=False"):
        optimizer.step()


def test_heads_that_see_only_some_micro_batches():
    """No parameter sees every micro-batch, and still each is counted."""
    heads = nn.ModuleList(nn.Linear(6, 3, dtype=torch.float64) for _ in range(3))
    optimizer, controller = attached(heads)
    for _ in range(2):  # the second window must not see the first one's norms
        for i in range(3):
            x, y = oracle.micro_batch(0, i)
            (oracle.loss_fn(heads[i](x), y) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses = [oracle.loss_fn(heads[i](oracle.micro_batch(0, i)[0]), oracle.micro_batch(0, i)[1]) for i in range(3)]
        variance, sqnorm = brute_force(heads, losses)
        assert controller.count == 3
        assert (controller.variance, controller.sqnorm) == pytest.approx((variance, max(sqnorm, 0)))


def test_tied_weights_are_measured_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6, dtype=torch.float64)
            self.b = nn.Linear(6, 6, dtype=torch.float64)
            self.b.weight = self.a.weight
            self.out = nn.Linear(6, 3, dtype=torch.float64)

        def forward(self, x):
            return self.out(self.b(self.a(x).tanh()))

    model = Tied()
    optimizer, controller = attached(model)
    for loss in losses_of(model):
        (loss / 3).backward()
    optimizer.step()
    assert controller.variance == pytest.approx(brute_force(model, losses_of(model))[0])


def test_sparse_complex_and_half_gradients():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True)
            self.z = nn.Parameter(torch.randn(4, dtype=torch.complex64))
            self.h = nn.Parameter(torch.randn(4).bfloat16())

        def forward(self, i):
            row = self.table(i)
            return (row.sum(0) * self.z).abs().square().sum() + (row.bfloat16() * self.h).float().square().sum()

    model = Odd()
    optimizer, controller = attached(model)
    grads = []
    for i in range(3):
        loss = model(torch.tensor([i, i + 1, i]))
        grads.append([g.to_dense().clone() for g in torch.autograd.grad(loss, list(model.parameters()))])
        loss = model(torch.tensor([i, i + 1, i]))
        (loss / 3).backward()
    optimizer.step()
    flat = torch.stack([torch.cat([torch.view_as_real(g).flatten().double() if g.is_complex() else g.flatten().double()
                                   for g in sample]) for sample in grads])  # fmt: skip
    mean = flat.mean(0)
    variance = float((flat - mean).square().sum() / 2)
    assert controller.variance == pytest.approx(variance, rel=1e-2)  # bfloat16 has three digits


def test_higher_order_backwards():
    """create_graph=True: gradients that require gradients."""
    model = oracle.make_model()
    optimizer, controller = attached(model)
    with pytest.warns(UserWarning, match="create_graph"):
        for loss in losses_of(model):
            (loss / 3).backward(create_graph=True)
    optimizer.step()
    assert controller.variance == pytest.approx(brute_force(model, losses_of(model))[0])


def test_parameters_added_later_are_followed():
    model = oracle.make_model()
    optimizer, controller = attached(model, model[2].parameters())
    for loss in losses_of(model):
        (loss / 3).backward()
    optimizer.step()
    model.zero_grad()
    before = controller.variance
    optimizer.add_param_group({"params": list(model[0].parameters())})
    for loss in losses_of(model):
        (loss / 3).backward()
    optimizer.step()  # no hook saw the new parameters' backwards: counted, not measured
    optimizer.zero_grad()
    assert (controller.count, controller.variance) == (3, before)
    for loss in losses_of(model):
        (loss / 3).backward()
    optimizer.step()
    assert controller.variance == pytest.approx(brute_force(model, losses_of(model))[0])


def test_memory_no_parameter_sized_buffer():
    """A backward leaves one number; what waits for its end are small gradients, and of large ones the rows' norms."""
    model = nn.Linear(1000, 1000)
    optimizer, controller = attached(model)
    queue, waiting = controller._gradients._norms.euclidean.queues[0], []
    model.weight.register_post_accumulate_grad_hook(
        lambda _: waiting.append(sum(t.numel() for t in queue.waiting + queue.rows))
    )
    for _ in range(3):
        (model(torch.randn(2, 1000)).square().mean() / 3).backward()
        assert queue.waiting == []
    assert all(0 < entries <= 1000 + 1_000_000 // 512 + 1 for entries in waiting)
    assert [t.numel() for t in queue.squares] == [1, 1, 1]
    optimizer.step()
    assert queue.squares == []


def test_a_gradient_that_ranks_have_not_averaged_is_unknown_whatever_the_loss_scale():
    p = nn.Parameter(torch.ones(2))
    gradients = GradientHooks(lambda: [p], measure=True, reduced=lambda: False, loss_scale=lambda: torch.tensor(2.0))
    (2 * p).sum().backward()
    window = gradients.window()
    assert window.norms["euclidean"].samples.item() == pytest.approx(2)
    assert window.norms["euclidean"].mean is None


@pytest.mark.parametrize("wrong", ["count", "shape", "empty", "after a backward", "sum"])
def test_observe_refuses_what_it_cannot_take(wrong):
    model = oracle.make_model()
    _, controller = attached(model, scale="count", reduction="sum" if wrong == "sum" else "mean")
    good = [torch.randn(3, *p.shape, dtype=torch.float64) for p in model.parameters()]
    if wrong == "after a backward":
        next(losses_of(model)).backward()
    bad = {"count": good[:-1], "shape": [*good[:-1], good[-1][:2]], "empty": [g[:0] for g in good]}.get(wrong, good)
    with pytest.raises(anybatch.AnybatchError, match="observe"):
        controller.observe(bad)
