"""Route parity: accumulation, DDP and FSDP2 see the same moments; and one rank's overflow is every rank's skip."""

import functools

import oracle
import pytest

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
