"""What becomes of a momentum: plain float64 loops, brute force, and the bound of stability."""

import math

import pytest
import torch
from torch import nn

import anybatch
from anybatch._scaling.momentum import automatic, averaged_exponent, interpolated_exponent

K = (1.0, 6.0, 2.5, 11.0, 3.0, 7.0)


@pytest.mark.parametrize("decays", ["clock", "constant", 0.5, 0.25])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.3}, {"weight_decay": 0.1}])
def test_sgd_against_a_plain_loop(decays, options):
    """B' = m' B + c (1 - d) g with c = (1 - m') / (1 - m); w moves by lr r B', with Nesterov by lr r (c g + m' B')."""
    a = {"clock": 1.0, "constant": 0.0}.get(decays, decays)
    lr, m = 0.03, 0.9
    p = nn.Parameter(torch.tensor([1.5, -0.4], dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=lr, momentum=m, **options)
    anybatch.attach(optimizer, model=nn.ParameterList([p]), scale=1, rule=steps_of(decays))
    w, buffer = p.detach().clone(), None
    curvature = torch.tensor([1.0, 3.0], dtype=torch.float64)
    for r in K:
        (0.5 * curvature * p.square()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        g = curvature * w + options.get("weight_decay", 0) * w
        now = m ** (r**a)
        c = (1 - now) / (1 - m)
        kept = 1 - options.get("dampening", 0.0)
        entering = g if buffer is None and r == 1 else kept * g  # torch's own first step takes the gradient undamped
        buffer = c * entering if buffer is None else now * buffer + c * kept * g
        w = w - lr * r * (c * g + now * buffer if options.get("nesterov") else buffer)
        assert torch.allclose(p.detach(), w, rtol=1e-12)


@pytest.mark.parametrize("decays", ["clock", "constant", 0.5])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.3}])
@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2, 2]])
def test_sparse_gradients_have_the_momentum_of_dense_ones(decays, options, rows):
    """A row that is not used has a gradient of 0, and its buffer moves it all the same, as in torch."""
    runs = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(3, 2, sparse=sparse, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, **options)
        anybatch.attach(optimizer, model=model, scale=1, rule=steps_of(decays))
        for _ in K:
            (model(torch.tensor(rows)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            runs.append(model.weight.detach().clone())
    for dense, sparse in zip(runs[: len(K)], runs[len(K) :], strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decays", ["clock", 0.5])
def test_rmsprop_against_a_plain_loop(decays):
    a = {"clock": 1.0}.get(decays, decays)
    lr, m, alpha = 0.01, 0.8, 0.9
    p = nn.Parameter(torch.tensor([1.5, -0.4], dtype=torch.float64))
    optimizer = torch.optim.RMSprop([p], lr=lr, momentum=m, alpha=alpha, eps=1e-8)
    anybatch.attach(optimizer, model=nn.ParameterList([p]), scale=1, rule=steps_of(decays))
    w, v, buffer = p.detach().clone(), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for r in K:
        p.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        g, k = 2 * w, r**a
        now, kept = m**k, alpha**k
        v = kept * v + (1 - kept) * g * g
        buffer = now * buffer + (1 - now) / (1 - m) * g / (v.sqrt() + 1e-8)
        w = w - lr * r**0.5 * buffer
        assert torch.allclose(p.detach(), w, rtol=1e-10)


def steps_of(decays):
    """A rule whose step t is of K[t] base iterations."""

    class Steps(anybatch.Rule):
        def __call__(self, *, scale, gain, clock, exponent):
            at = next((i for i in range(len(K)) if math.isclose(sum(K[:i]), clock.tau, abs_tol=1e-9)), 0)
            return anybatch.Scaling(K[at] ** exponent, K[at])

    return Steps(decays=decays)


@pytest.mark.parametrize(
    ("task", "momentum", "scale", "total"),
    [
        ("cifar10", 0.9, 64, 39_100), ("imagenet", 0.9, 128, 451_000), ("speech", 0.9, 32, 84_800),
        ("transformer", 0.99, 128, 1_550_000), ("yolo", 0.9, 128, 207_000),
    ],
)  # fmt: skip
def test_automatic_is_constant_in_the_papers_runs(task, momentum, scale, total):
    assert automatic(momentum, scale=scale, total=total) == 0


def test_automatic_goes_half_of_the_way_where_a_constant_one_would_remember_more_than_a_fiftieth_of_the_run():
    assert automatic(0.9, scale=8, total=4000) == 0  # 80 base iterations of 4000, whatever 1 - 0.9 is in binary
    assert automatic(0.9, scale=8, total=3999) == 0.5
    assert automatic(0.9, scale=0.5, total=100) == 0
    assert automatic(0.9, scale=128, total=None) == 0


@pytest.mark.parametrize(("total", "power"), [(10_000, 0.0), (100, 0.5)])
def test_automatic_by_the_length_of_the_run(total, power):
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    controller = anybatch.attach(optimizer, model=nn.ParameterList([p]), total=total, scale="count")
    inside = []
    optimizer.register_step_pre_hook(lambda o, *_: inside.append(o.param_groups[0]["momentum"]))
    for sample in ([1.0, 0.0], [0.0, 1.0]):
        (p @ torch.tensor(sample, dtype=torch.float64) / 2).backward()
    optimizer.step()
    assert controller.gain == pytest.approx(2**0.5)
    assert inside == [pytest.approx(0.9 ** (controller.gain**power))]


def test_a_momentum_that_never_forgets_has_no_length():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=1.0)
    for decays in ("auto", "clock", 0.5):
        with pytest.raises(anybatch.InvalidValueError, match="never forgets"):
            anybatch.attach(optimizer, model=nn.ParameterList([p]), scale=2, rule=anybatch.AdaScale(decays=decays))
    anybatch.attach(optimizer, model=nn.ParameterList([p]), scale=2, rule=anybatch.AdaScale(decays="constant"))


@pytest.mark.parametrize("decays", ["constant", "clock", 0.5])
@pytest.mark.parametrize("near", [0.97, 1.03])
def test_the_bound_of_stability(decays, near):
    """On a curvature h the recursion is stable while h * lr < 2 (1 + m') (1 - m) / (r (1 - m'))."""
    r, m = 16.0, 0.9
    now = m ** {"constant": 1, "clock": r, 0.5: r**0.5}[decays]
    lr = near * 2 * (1 + now) * (1 - m) / (r * (1 - now))
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=lr, momentum=m)

    class Always(anybatch.Rule):
        def __call__(self, *, scale, gain, clock, exponent):
            return anybatch.Scaling(r, r)

    anybatch.attach(optimizer, model=nn.ParameterList([p]), scale=1, rule=Always(decays=decays))
    for _ in range(1500):
        (0.5 * p.square()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (float(p.detach().abs()) < 1e-3) == (near < 1)


@pytest.mark.parametrize("m", [0.0, 0.5, 0.95, 0.99])
@pytest.mark.parametrize("r", [2, 8, 100])
def test_averaged_exponent_against_the_sum_over_all_pairs(m, r):
    """Many base iterations in steps of one and in steps of r go equally far: the sums of all pairs' correlations."""

    def far(memory, steps):
        return math.sqrt(sum((steps - abs(d)) * memory ** abs(d) for d in range(1 - steps, steps)))

    n = 100_000 if m == 0.99 else 20_000
    assert r ** averaged_exponent(r, m) == pytest.approx(far(m, n) / far(m**r, n // r), rel=0.01)
    assert 0.5 <= averaged_exponent(1 / r, m) <= 1
    assert averaged_exponent(r, m) == pytest.approx(averaged_exponent(1 / r, m**r))  # there and back


@pytest.mark.parametrize(("share", "memory"), [(0.9, 0.99), (0.95, 0.98), (0.5, 0.9), (0.0, 0.9)])
@pytest.mark.parametrize("r", [2, 8, 100])
def test_interpolated_exponent_against_the_sum_over_all_pairs(share, memory, r):
    """Many directions `share * average + (1 - share) * g`, over their own size: the sums of all pairs' correlations."""

    def far(b, steps):
        weights = [1 - share, *(share * (1 - b) * b**j for j in range(int(40 / (1 - b))))]
        size = sum(w * w for w in weights)
        # Sum over all pairs of steps = sum over gradients of (all the weight that each has in the end)^2.
        reach, total = 0.0, 0.0
        for w in weights[:steps]:
            reach += w
            total += reach * reach
        return math.sqrt((total + reach * reach * max(steps - len(weights), 0)) / size)

    n = 40_000
    assert r ** interpolated_exponent(r, share, memory) == pytest.approx(
        far(memory, n) / far(memory**r, n // r), rel=0.02
    )
    there = r ** interpolated_exponent(r, share, memory)
    assert there * 3 ** interpolated_exponent(3, share, memory**r) == pytest.approx(
        (3 * r) ** interpolated_exponent(3 * r, share, memory)  # a batch times r, then times 3
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_law_signs_of_averaged_noise_go_as_far_at_any_batch(momentum):
    """Directions that are averages of noise, as Muon's and a sign's are, in steps of 1 and of 8 base iterations."""
    torch.manual_seed(0)

    def spread(r, factor):
        b, w = torch.zeros(20_000), torch.zeros(20_000)
        kept = momentum**r
        for t in range(int((400 + 1024) / r)):
            b = kept * b + (1 - kept) * torch.randn(20_000) / r**0.5
            if t * r >= 400:  # the memory is full
                w = w + factor * b.sign()
        return float(w.square().mean().sqrt())

    base = spread(1, 1)
    assert spread(8, 8 ** averaged_exponent(8, momentum)) == pytest.approx(base, rel=0.1)
    far_off = spread(8, 8 if momentum == 0 else 8**0.5)  # linear without momentum, the square root with it
    assert abs(math.log(far_off / base)) > 0.7
