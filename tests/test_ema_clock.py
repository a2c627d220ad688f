"""The memory of ModelEMA: half-lives, warm-up, several decays and rare updates against plain float64 loops."""

import functools
import io
import itertools
import math
import pickle

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import anybatch
from anybatch._ema.decay import new_weight, scheduled_weight

DECAYS = st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.999, 0.99999])
STRETCHES = st.floats(0, 1e4)


def walk(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p.dtype))


def averages(ema, key="averages"):
    return [average.clone() for average in ema.state_dict()[key].values()]


def close(mine, theirs, rtol=1e-12):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14)


def test_half_life():
    assert anybatch.half_life(10) ** 10 == pytest.approx(0.5, rel=1e-14)
    assert anybatch.half_life(10_000, base_batch=250) ** 40 == pytest.approx(0.5, rel=1e-14)
    model = oracle.make_model()
    before = [p.detach().clone() for p in model.parameters()]
    ema = anybatch.ModelEMA(model, anybatch.half_life(2048, base_batch=64), base_batch=64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for batch_size in (512, 1024, 384, 128):  # 2048 examples in all
        ema.update(batch_size=batch_size)
    close(averages(ema), [p / 2 for p in before])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"span": 0}, "span"), ({"span": float("nan")}, "span"), ({"span": 1e17}, "rounds"),
     ({"span": 5, "base_batch": -1}, "base_batch")],
)  # fmt: skip
def test_half_life_is_in_range(arguments, match):
    with pytest.raises(anybatch.InvalidValueError, match=match):
        anybatch.half_life(**arguments)


def test_the_step_is_said_once():
    ema = anybatch.ModelEMA(oracle.make_model(), 0.9)
    with pytest.raises(anybatch.UsageError, match="base_batch"):
        ema.update(batch_size=4)
    with pytest.raises(anybatch.InvalidValueError, match="not both"):
        ema.update(1, batch_size=4)
    with pytest.raises(anybatch.InvalidValueError, match="batch_size"):
        anybatch.ModelEMA(oracle.make_model(), 0.9, base_batch=4).update(batch_size=-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"decay": ()}, "at least one"), ({"decay": (0.9, 0.9)}, "different"), ({"decay": (0.9, 1.0)}, "decay"),
     ({"decay": 0.9, "update_every": 0}, "update_every"), ({"decay": 0.9, "base_batch": 0}, "base_batch")],
)  # fmt: skip
def test_options_are_in_range(options, match):
    with pytest.raises(anybatch.InvalidValueError, match=match):
        anybatch.ModelEMA(oracle.make_model(), **options)


# ---- warm-up


def plain_warm_up(decay, first, steps):
    """The weight of what was there before, after base iterations `first`, `first + 1`, ...: one at a time."""
    kept = 1.0
    for t in range(first, first + steps):
        kept *= min(decay, (1 + t) / (10 + t))
    return kept


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.1, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("first", [0, 1, 7, 80, 5000])
@pytest.mark.parametrize("steps", [0, 1, 2, 30, 2000])
def test_the_warm_up_against_a_plain_loop(decay, first, steps):
    weight = new_weight(decay, iterations=float(steps), tau=float(first), warmup=True)
    assert weight == pytest.approx(1 - plain_warm_up(decay, first, steps), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_the_warm_up_of_averages_against_a_plain_loop(decay):
    """Steps of several base iterations, as a loop that does each base iteration alone at the step's weights."""
    model = oracle.make_model()
    ema = anybatch.ModelEMA(model, decay, warmup=True)
    plain, t = [p.detach().clone() for p in model.parameters()], 0
    for seed, k in enumerate((1, 1, 3, 12, 1, 40, 7)):
        walk(model, seed)
        ema.update(k)
        for _ in range(k):
            rho = min(decay, (1 + t) / (10 + t))
            plain = [rho * a + (1 - rho) * p.detach() for a, p in zip(plain, model.parameters(), strict=True)]
            t += 1
    close(averages(ema), plain, rtol=1e-10)
    assert ema.tau == t


@given(DECAYS, STRETCHES, STRETCHES, st.floats(0, 1e4), st.booleans())
def test_law_a_stretch_of_the_clock_may_be_divided_anywhere(decay, first, second, tau, warmup):
    def kept(k, start):
        return 1 - new_weight(decay, iterations=k, tau=start, warmup=warmup)

    whole = kept(first + second, tau)
    assert kept(first, tau) * kept(second, tau + first) == pytest.approx(whole, rel=1e-6, abs=1e-12)


@given(DECAYS, STRETCHES, STRETCHES, st.floats(0, 1e4))
def test_law_a_warm_up_forgets_at_least_as_much(decay, k, tau, more):
    cold, warm = (new_weight(decay, iterations=k, tau=tau, warmup=w) for w in (False, True))
    later = new_weight(decay, iterations=k, tau=tau + more, warmup=True)
    assert 0 <= cold <= warm * (1 + 1e-9) <= 1 + 1e-9
    assert later <= warm * (1 + 1e-9)
    assert new_weight(decay, iterations=k, tau=float("inf"), warmup=True) == cold


def test_the_warm_up_forgets_the_first_weights():
    model = nn.Linear(3, 1, bias=False)
    averages_after = {}
    for warmup in (False, True):
        with torch.no_grad():
            model.weight.fill_(100)
        ema = anybatch.ModelEMA(model, 0.9999, warmup=warmup)
        with torch.no_grad():
            model.weight.zero_()
        for _ in range(20):
            ema.update()
        averages_after[warmup] = float(averages(ema)[0].max())
    assert averages_after[False] > 99
    assert averages_after[True] < 1e-4


# ---- several decays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_several_decays_are_several_averages(dtype):
    decays = (0.0, 0.9, 0.9999)
    together, alone = (oracle.make_model().to(dtype) for _ in range(2))
    ema = anybatch.ModelEMA(together, decays, warmup=True)
    each = [anybatch.ModelEMA(alone, decay, warmup=True) for decay in decays]
    for seed in range(5):
        walk(together, seed)
        walk(alone, seed)
        ema.update(2.5)
        for one in each:
            one.update(2.5)
    for i, one in enumerate(each):
        mine = averages(ema, "averages" if i == 0 else f"averages_{i}")
        assert all(map(torch.equal, mine, averages(one)))
        with ema.applied(decays[i]), one.applied():
            assert all(map(torch.equal, together.parameters(), alone.parameters()))
    assert all(map(torch.equal, together.parameters(), alone.parameters()))
    for wrong in (None, 0.5):
        with pytest.raises(anybatch.InvalidValueError, match="one of the decays"), ema.applied(wrong):
            pass
    with pytest.raises(anybatch.InvalidValueError, match="one of the decays"), each[1].applied(0.8):
        pass


def test_tensors_larger_than_a_piece_and_with_gaps():
    """Several averages are taken piece by piece; strides that leave gaps or are not the average's are taken whole."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"large": nn.Linear(1100, 1000, bias=False), "gaps": nn.Linear(7, 3), "turned": nn.Linear(5, 4)}
    )
    model["gaps"].weight = nn.Parameter(torch.randn(3, 14)[:, ::2])
    model["turned"].weight = nn.Parameter(torch.randn(5, 4).t())
    model = model.to(torch.bfloat16)
    ema = anybatch.ModelEMA(model, (0.5, 0.75))
    plain = {d: [p.detach().double() for p in model.parameters()] for d in (0.5, 0.75)}
    for seed in range(3):
        walk(model, seed)
        if seed == 1:
            model["turned"].weight.data = model["turned"].weight.data.contiguous()  # other strides than the average's
        ema.update()
        for d, average in plain.items():
            plain[d] = [d * a + (1 - d) * p.detach().double() for a, p in zip(average, model.parameters(), strict=True)]
    for key, d in (("averages", 0.5), ("averages_1", 0.75)):
        for mine, theirs in zip(averages(ema, key), plain[d], strict=True):
            torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-6)


def test_the_states_of_other_decays_are_refused():
    model = oracle.make_model()
    state = anybatch.ModelEMA(model, (0.9, 0.99)).state_dict()
    for decay in (0.9, (0.99, 0.9), (0.9, 0.99, 0.999), (0.9, 0.98)):
        with pytest.raises(anybatch.StateError, match="decay"):
            anybatch.ModelEMA(model, decay).load_state_dict(state)
    anybatch.ModelEMA(model, [0.9, 0.99]).load_state_dict(state)


# ---- rare updates


def test_update_every_keeps_the_half_life():
    """Against a loop that adds up the iterations and moves at every third update."""
    model = oracle.make_model()
    ema = anybatch.ModelEMA(model, 0.95, update_every=3)
    plain, waiting = [p.detach().clone() for p in model.parameters()], 0.0
    for seed, k in enumerate((1, 2.5, 4, 0.5, 3, 1, 1)):
        walk(model, seed)
        ema.update(k)
        waiting += k
        if seed % 3 == 2:
            rho = 0.95**waiting
            plain = [rho * a + (1 - rho) * p.detach() for a, p in zip(plain, model.parameters(), strict=True)]
            waiting = 0.0
        close(averages(ema), plain)
    state = ema.state_dict()
    assert (state["pending"], state["waiting"], state["tau"]) == (1, 1, 12)


@pytest.mark.parametrize("resume_at", [1, 2, 3, 5])
def test_resuming_between_two_moves_is_exact(resume_at):
    def train(resume):
        model = oracle.make_model()
        options = {"update_every": 3, "warmup": True}
        ema = anybatch.ModelEMA(model, (0.9, 0.999), **options)
        for t in range(8):
            if t == resume:
                file = io.BytesIO()
                torch.save(ema.state_dict(), file)
                file.seek(0)
                ema = anybatch.ModelEMA(model, (0.9, 0.999), **options)
                ema.load_state_dict(torch.load(file, weights_only=True))
            walk(model, t)
            ema.update(1.5)
        return ema

    whole, resumed = train(None), train(resume_at)
    for key in ("averages", "averages_1"):
        assert all(map(torch.equal, averages(whole, key), averages(resumed, key)))
    numbers = ("tau", "pending", "waiting", "version", "decay")
    assert [whole.state_dict()[n] for n in numbers] == [resumed.state_dict()[n] for n in numbers]


# ---- a decay that changes ----


def fine(rho, tau, k, kinks=()):
    """What a stretch keeps, by the midpoint rule at 20,000 points of each part between kinks: a plain loop."""
    total, ends = 0.0, sorted({tau, tau + k, *(x for x in kinks if tau < x < tau + k)})
    for start, end in itertools.pairwise(ends):
        step = (end - start) / 20_000
        total += sum(math.log(rho(start + (i + 0.5) * step)) for i in range(20_000)) * step
    return math.exp(total)


def stairs(tau):
    return 0.9 if tau < 3.3 else 0.99


def bent(tau):
    return min(0.999, 0.5 + 0.1 * tau)


SCHEDULES = {
    "cosine": (anybatch.cosine_decay(0.9, total=40.0), (40.0,)),
    "cosine from far below": (anybatch.cosine_decay(0.01, total=40.0), (40.0,)),
    "cosine, falling": (anybatch.cosine_decay(0.99, total=40.0, end=0.5), (40.0,)),
    "stairs": (stairs, (3.3,)),
    "bent": (bent, (4.99,)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [(1.0, 7.5, 0.3, 20.0, 11.2, 5.0), (30.0, 32.0), (2.0, 100.0)])
def test_a_schedule_in_steps_of_any_length_is_the_product_of_its_base_iterations(name, steps):
    rho, kinks = SCHEDULES[name]
    model = torch.nn.Linear(3, 2).double()
    ema = anybatch.ModelEMA(model, rho)
    average, tau = [p.detach().clone() for p in model.parameters()], 0.0
    for k in steps:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update(k)
        kept = fine(rho, tau, k, kinks)
        average = [kept * a + (1 - kept) * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
        tau += k
        close(averages(ema), average, rtol=1e-7)


@pytest.mark.parametrize(("tau", "k"), [(30.0, 20.0), (39.0, 32.0), (39.9, 0.2), (990.0, 64.0)])
def test_a_cosine_is_exact_over_its_kink(tau, k):
    rho = anybatch.cosine_decay(0.996, total=40.0)
    weight = scheduled_weight(rho, iterations=k, tau=tau)
    assert weight == pytest.approx(1 - fine(rho, tau, k, (40.0,)), rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 6.94, 16.97])
@pytest.mark.parametrize("jumps", [(1,) * 12, (5, 1, 30, 2, 64), (100, 7)])
def test_the_power_function_is_the_product_of_its_base_iterations(gamma, jumps):
    """EDM2's beta(t) = (1 - 1/t) ** (gamma + 1), one base iteration at a time in float64, at the jump's own weights."""

    def power(tau, k):
        return (tau / (tau + k)) ** (gamma + 1)

    model = torch.nn.Linear(3, 2).double()
    ema = anybatch.ModelEMA(model, power)
    average, t = [p.detach().clone() for p in model.parameters()], 0
    for seed, jump in enumerate(jumps):
        walk(model, seed)
        ema.update(jump)
        for _ in range(jump):
            t += 1
            beta = (1 - 1 / t) ** (gamma + 1)
            average = [beta * a + (1 - beta) * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
        close(averages(ema), average, rtol=1e-10)
    assert ema.tau == t


def power_of_17(tau, k, *, gamma=16.97):
    return (tau / (tau + k)) ** (gamma + 1)


def test_a_function_of_a_stretch_is_told_by_its_arguments_and_can_be_pickled():
    model = oracle.make_model()
    ema = anybatch.ModelEMA(model, functools.partial(power_of_17, gamma=1.0))
    twin = pickle.loads(pickle.dumps(ema))
    for each in (ema, twin):
        walk(model, 3)
        each.update(4)
        each.update(4.0)
        assert each.tau == 8
    of_tau = anybatch.ModelEMA(model, lambda tau, gamma=0.5: gamma)  # one argument, and one with a default
    before = averages(of_tau)
    walk(model, 4)
    of_tau.update(2)
    expected = [0.25 * a + 0.75 * p.detach() for a, p in zip(before, model.parameters(), strict=True)]
    close(averages(of_tau), expected, rtol=1e-9)
    for wrong in (-0.1, 1.1, math.nan, "much"):
        with pytest.raises(anybatch.InvalidValueError, match=r"share in \[0, 1\]"):
            anybatch.ModelEMA(model, lambda tau, k, given=wrong: given).update(1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: anybatch.cosine_decay(0.0, total=10),
        lambda: anybatch.cosine_decay(0.9, total=0),
        lambda: anybatch.cosine_decay(0.9, total=10, end=1.1),
        lambda: anybatch.ModelEMA(torch.nn.Linear(1, 1), anybatch.cosine_decay(0.9, total=10), warmup=True),
        lambda: anybatch.ModelEMA(torch.nn.Linear(1, 1), lambda tau: 1.5).update(1),
    ],
)
def test_schedules_out_of_range(make):
    with pytest.raises(anybatch.InvalidValueError):
        make()


def test_a_cosine_is_at_its_ends_and_between_them():
    """Half of the way in the middle, a quarter of pi at a quarter; beyond its ends it stands still."""
    decay = anybatch.cosine_decay(0.96, total=200)
    for tau, expected in ((-5, 0.96), (0, 0.96), (50, 1 - 0.04 * (1 + 0.5**0.5) / 2), (100, 0.98), (200, 1), (300, 1)):
        assert decay(tau) == pytest.approx(expected, rel=1e-12)
