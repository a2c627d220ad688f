"""Route parity: accumulation, DDP and FSDP2 see the same moments; and one rank's overflow is every rank's skip."""

import functools
import math

import oracle
import pytest
import torch

import anybatch
from distributed import launch
from distributed import route_workers as workers


@functools.cache
def routes(world):
    return launch.run(workers.routes, world=world, args=(world,))


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_same_micro_batches_give_the_same_moments(world, accumulation):
    samples = world * accumulation
    expected = workers.moments(oracle.make_model(), accumulation=samples)
    assert expected[0] == samples
    for result in routes(world):
        for engine in ("DDP", "FSDP2"):
            assert result[engine, accumulation] == pytest.approx(expected, rel=1e-6, nan_ok=samples == 1)


def test_an_overflow_on_one_rank_is_a_skip_on_all():
    first, second = launch.run(workers.overflow_on_one_rank, world=2, args=(2,))
    assert first == second
    steps, skipped, tau, scale, finite = first
    assert (steps, skipped, scale, finite) == (4, 1, 32.0, True)
    assert 4 <= tau <= 8


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("rule", [anybatch.AdaScale(smoothing=0.0), anybatch.Linear()])
def test_trap_uneven_inputs_join(rule, divide):
    """A rank that is done adds nothing: the moments are those of the micro-batches that there were, by a plain loop."""
    world = 3
    results = launch.run(workers.uneven, world=world, args=(world, rule, divide))
    seen, state, position, parameters = results[-1]
    assert [count for count, _, _ in seen] == [6, 6, 6, 4, 4, 2, 2]
    if isinstance(rule, anybatch.AdaScale):
        for t, (count, gain, weights) in enumerate(seen):
            model = oracle.make_model()
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights, strict=True):
                    p.copy_(w)
            grads = []
            for rank in range(world - count // 2, world):
                for a in range(2):
                    x, y = oracle.micro_batch(t, rank * 2 + a)
                    grads.append(torch.autograd.grad(oracle.loss_fn(model(x), y), list(model.parameters())))
            mean = [sum(g) / count for g in zip(*grads, strict=True)]
            deviation = sum(oracle.norm2([a - b for a, b in zip(g, mean, strict=True)]) for g in grads) / (count - 1)
            v, q = max(deviation, 0), max(oracle.norm2(mean) - deviation / count, 0)
            full = (v + q) / (v / count + q)
            assert gain == pytest.approx(full ** (1 - math.sqrt(0.5) ** (t + 2)), rel=1e-6), t
    for _, other, at, weights in results:
        assert (other, at) == (state, position)
        assert all(map(torch.equal, weights, parameters))


def test_model_averages_of_shards_are_those_of_the_whole():
    whole = launch.run(workers.averaged, world=2, args=(2, False))
    shards = launch.run(workers.averaged, world=2, args=(2, True))
    for average, restored, moved in whole + shards:
        assert restored
        assert moved
        for mine, expected in zip(average, whole[0][0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
