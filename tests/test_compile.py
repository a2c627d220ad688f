"""torch.compile of the model and of the optimizer's step: the same numbers, and nothing recompiled after warm-up."""

import copy

import oracle
import pytest
import torch
from torch._dynamo.utils import counters

import anybatch

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(thing):
    return torch.compile(thing, backend="aot_eager")


def train(make, *, compile_model=False, compile_step=False, steps=8, **options):
    """Gains, parameters, and the number of graphs and breaks after the third step."""
    model = oracle.make_model()
    forward = compiled(model) if compile_model else model
    optimizer = make(model.parameters())
    controller = anybatch.attach(optimizer, model=model, scale="count", total=100, **options)
    step = compiled(optimizer.step) if compile_step else optimizer.step
    gains, warm = [], None
    for t in range(steps):
        for i in range(3):
            x, y = oracle.micro_batch(t, i)
            (oracle.loss_fn(forward(x), y) / 3).backward()
        step()
        optimizer.zero_grad()
        gains.append(controller.gain)
        state = (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
        warm = state if t == 2 else warm
    return gains, [p.detach().clone() for p in model.parameters()], (warm, state)


def lr():
    return torch.tensor(0.05, dtype=torch.float64)


MAKERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=lr(), momentum=0.9, foreach=True),
    "Adam, constant decays": lambda p: torch.optim.Adam(p, lr=lr(), foreach=False),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "what", [{"compile_model": True}, {"compile_step": True}, {"compile_model": True, "compile_step": True}]
)
def test_compiled_training_is_the_same_and_stays_compiled(name, what):
    rule = anybatch.AdaScale(decays="constant")
    eager, eager_parameters, _ = train(MAKERS[name], rule=rule)
    gains, parameters, (warm, end) = train(MAKERS[name], rule=rule, **what)
    assert len(set(eager)) > 3  # the gain changes from step to step: a baked-in one would show
    assert gains == pytest.approx(eager, rel=1e-5)  # a compiled Adam debiases in the float32 of its step count
    for p, q in zip(parameters, eager_parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    assert end == warm


def test_trap_a_compiled_step_must_not_bake_in_the_gain():
    """A learning rate in a float is a constant of the graph: right, but compiled again for every gain."""
    make = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)  # noqa: E731
    eager, eager_parameters, _ = train(make, steps=5)
    gains, parameters, _ = train(make, steps=5, compile_step=True)
    assert gains == pytest.approx(eager, rel=1e-9)
    for p, q in zip(parameters, eager_parameters, strict=True):
        torch.testing.assert_close(p, q)


def test_the_hooks_add_no_break_of_their_own_to_a_compiled_model():
    breaks = []
    for attach in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = oracle.make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if attach:
            anybatch.attach(optimizer, model=model, scale="count")
        forward = compiled(model)
        for t in range(3):
            for i in range(2):
                x, y = oracle.micro_batch(t, i)
                (oracle.loss_fn(forward(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        breaks.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]))
    assert breaks[0] == breaks[1]


def test_attaching_after_compiling():
    model = oracle.make_model()
    forward = compiled(model)
    x, y = oracle.micro_batch(0, 0)
    oracle.loss_fn(forward(x), y).backward()
    model.zero_grad()
    reference = copy.deepcopy(model)
    found = []
    for m, f in ((reference, reference), (model, forward)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        controller = anybatch.attach(optimizer, model=m, scale="count")
        for i in range(3):
            x, y = oracle.micro_batch(1, i)
            (oracle.loss_fn(f(x), y) / 3).backward()
        optimizer.step()
        found.append((controller.count, controller.gain))
    assert found[0] == pytest.approx(found[1], rel=1e-9)
