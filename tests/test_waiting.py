"""Small gradients wait for the end of a backward and are measured together: nothing that happens meanwhile may show.

DDP's buckets, bucket views and static graphs, and FSDP2's freed storage are in `tests/distributed`, whose models have
small gradients alone; re-entrant checkpoints, sparse and complex gradients and failed backwards in `test_gather.py`.
"""

import math

import pytest
import torch
from common import Fails
from torch import nn

import anybatch
from anybatch._gradients import euclidean


class Fans(nn.Module):
    """Parameters whose gradients reach them in different ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(7))
        self.b = nn.Parameter(torch.randn(7))  # gets the very tensor that `a` gets
        self.twice = nn.Parameter(torch.randn(7, 7))
        self.expanded = nn.Parameter(torch.randn(3, 7))  # gets one number, expanded
        self.short = nn.Parameter(torch.randn(7).bfloat16())
        self.long = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.large = nn.Linear(7, 5000)
        self.scalar = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        h = torch.tanh(x * (self.a + self.b)) @ self.twice
        h = torch.tanh(h) @ self.twice * self.scalar
        h = h * self.short.float() * self.long.float()
        return self.large(h).square().mean() + x.mean() * self.expanded.sum()


def inputs(i):
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(i))


def attached(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options.setdefault("rule", anybatch.AdaScale(smoothing=0.0))
    return optimizer, anybatch.attach(optimizer, model=model, scale="count", **options)


def squares(model, indices, forward=None):
    """The sum of the squared norms of the micro-batches' gradients, and the squared norm of their sum: plain loops."""
    grads = []
    for i in indices:
        loss = (forward or model)(inputs(i)) / len(indices)
        grads.append([g.double() for g in torch.autograd.grad(loss, list(model.parameters()))])
    total = [sum(g) for g in zip(*grads, strict=True)]
    return (
        math.fsum(float(x.square().sum()) for g in grads for x in g),
        math.fsum(float(x.square().sum()) for x in total),
    )


def seen(controller):
    window = controller._gradients.window()
    return float(window.norms["euclidean"].samples), float(window.norms["euclidean"].mean)


def accumulate(model, indices):
    for i in indices:
        (model(inputs(i)) / len(indices)).backward()


@pytest.mark.parametrize("room", [0, 200, 1 << 24], ids=["none waits", "some wait", "all wait"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_whatever_waits_the_norms_are_those_of_the_plain_loop(monkeypatch, room, set_to_none):
    """The first gradient may become `.grad`, the later ones are added to it; some parameters share one tensor."""
    monkeypatch.setattr(euclidean, "_ROOM", room)
    model = Fans()
    optimizer, controller = attached(model)
    for step in range(3):
        indices = range(10 * step, 10 * step + 3)
        expected = squares(model, indices)
        accumulate(model, indices)
        samples, grad = seen(controller)
        assert samples == pytest.approx(expected[0], rel=1e-8)  # the large gradient's rows are in float32
        assert grad == pytest.approx(expected[1], rel=1e-2)  # `.grad` of one parameter is in bfloat16
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def test_how_many_wait_alters_nothing(monkeypatch):
    found = []
    for room in (0, 1 << 24):
        monkeypatch.setattr(euclidean, "_ROOM", room)
        model = Fans()
        _, controller = attached(model)
        accumulate(model, range(4))
        found.append(seen(controller))
    assert found[0] == pytest.approx(found[1], rel=1e-14)


def test_many_small_gradients_are_measured_in_float64():
    """Blocks of several hundred tensors, to 1e-13 of the plain float64 sum."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(200)))
    optimizer, controller = attached(model)
    x = torch.randn(4, 24)
    expected = []
    for _ in range(2):
        (model(x).sum() / 2).backward()
        expected.append([p.grad.double().clone() for p in model.parameters()])
        x = x + 1
    samples = [expected[0], [b - a for a, b in zip(*expected, strict=True)]]
    first = math.fsum(float(g.square().sum()) for g in samples[0])
    assert float(controller._gradients._norms.euclidean.queues[0].squares[0]) == pytest.approx(first, rel=1e-13)
    total = math.fsum(float(g.square().sum()) for g in expected[1])
    assert float(controller._gradients.window().norms["euclidean"].mean) == pytest.approx(total, rel=1e-13)


def test_what_is_written_to_grad_at_once_does_not_show():
    """A hook after the accumulation that scales `.grad` in place: a gradient that waits is not `.grad`."""
    model = Fans()
    _, controller = attached(model)
    expected = squares(model, range(3))[0]

    def halve(p):
        p.grad.mul_(0.5)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(halve)
    accumulate(model, range(3))
    assert float(controller._gradients.window().norms["euclidean"].samples) == pytest.approx(expected, rel=1e-8)


def test_a_gradient_that_a_hook_takes_away_is_measured():
    """As FSDP2 does with the unsharded gradients."""
    model = Fans()
    _, controller = attached(model)
    expected = squares(model, [0])[0]
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    accumulate(model, [0])
    assert float(controller._gradients._norms.euclidean.queues[0].squares[0]) == pytest.approx(expected, rel=1e-8)


def test_gradients_asked_for_in_the_middle_of_a_backward():
    """torch.autograd.grad and a re-entrant backward of something else, from inside of a hook, while gradients wait."""
    model = Fans()
    asked = []

    def ask(grad):
        with torch.enable_grad():
            asked.append(torch.autograd.grad(100 * (model.a * model.large.bias[:7]).sum(), [model.a, model.large.bias]))
            other = torch.ones(3, requires_grad=True)
            other.square().sum().backward()

    expected = squares(model, range(3))
    model.twice.register_hook(ask)
    _, controller = attached(model)
    accumulate(model, range(3))
    assert len(asked) == 3
    assert controller._gradients.pending == 3
    assert seen(controller)[0] == pytest.approx(expected[0], rel=1e-8)


class Careless(torch.autograd.Function):
    """Changes in place what it was given, which the addition before it gave to a parameter too; or does not."""

    @staticmethod
    def forward(ctx, x, careless):
        ctx.careless = careless
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.mul_(3) if ctx.careless else g * 3, None


def test_a_gradient_written_to_while_it_waits_is_noticed():
    """Its window is not measured; from then on nothing waits, and all is measured as it comes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.added = nn.Linear(7, 7), nn.Parameter(torch.randn(4, 7))

        def forward(self, x, careless=True):
            return (Careless.apply(self.first(x), careless) + self.added).square().mean()

    model = Net()
    optimizer, controller = attached(model)
    for t in range(3):
        accumulate(model, range(2))
        window = controller._gradients.window()
        if t == 0:
            assert window.norms == {}
        else:
            expected = squares(model, range(2), forward=lambda x: model(x, careless=False))[0]
            assert float(window.norms["euclidean"].samples) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()


def test_a_failed_backward_leaves_nothing_waiting_for_the_next():
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 3)).double()
    optimizer, controller = attached(model)
    with pytest.raises(ZeroDivisionError):
        model[1](Fails.apply(model[0](inputs(0).double()))).sum().backward()
    assert len(controller._gradients._norms.euclidean.queues[0].waiting) == 2
    optimizer.zero_grad()
    model(inputs(1).double()).sum().backward()
    expected = math.fsum(float(p.grad.square().sum()) for p in model.parameters())
    assert float(controller._gradients.window().norms["euclidean"].samples) == pytest.approx(expected, rel=1e-13)
    assert controller._gradients._norms.euclidean.queues[0].waiting == []


def test_a_sparse_gradient_of_a_small_table_does_not_wait():
    """Its entries are those of the words, not of the table."""
    table = nn.Embedding(3, 2, sparse=True)
    _, controller = attached(table)
    waiting = []
    table.weight.register_post_accumulate_grad_hook(
        lambda _: waiting.append(len(controller._gradients._norms.euclidean.queues[0].waiting))
    )
    words = torch.randint(3, (50_000,))
    table(words).sum().backward()
    counts = torch.bincount(words).double()
    assert waiting == [0]
    assert float(controller._gradients.window().norms["euclidean"].samples) == pytest.approx(
        float(2 * counts.square().sum())
    )
