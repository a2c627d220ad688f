"""AdaScale(metric="adam") over gloo processes, against the plain loop."""

import functools

import pytest
import torch
from metric_oracle import READY, plain_loop

from distributed import launch
from distributed import metric_workers as workers


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def parity(world):
    return launch.run(workers.parity, world=world, args=(world,))


CASES = [(2, "DDP"), (2, "FSDP2"), (4, "DDP"), (4, "FSDP2"), (4, "replicas of FSDP2")]


@pytest.mark.parametrize(("world", "case"), CASES, ids=str)
def test_agrees_with_the_plain_loop(world, case):
    counts, repeat = ((2 * world,), 1) if case == "DDP" else ((2,), world)
    expected, _ = plain_loop(steps=20, counts=counts, repeat=repeat)
    for result in parity(world):
        mine = result[case]
        assert [gain for gain, *_ in mine] == pytest.approx([r for r, *_ in expected], rel=1e-9)
        for (_, *moments), (_, variance, sqnorm, *_) in zip(mine, expected, strict=True):
            assert moments == pytest.approx([variance, sqnorm], rel=1e-7, nan_ok=True)


@pytest.mark.parametrize("world", [2, 4])
def test_gains_are_bitwise_equal_on_all_ranks(world):
    first, *others = parity(world)
    for other in others:
        for case, mine in first.items():
            assert [gain for gain, *_ in mine] == [gain for gain, *_ in other[case]], case


def test_trap_what_a_rank_sees_of_its_shard_is_unbiased():
    for (_, *whole), (_, *shards) in launch.run(workers.unbiased, world=2, args=(2,)):
        assert shards == pytest.approx(whole, rel=0.15)
        assert shards != pytest.approx(whole, rel=1e-6)


def test_a_weight_that_one_rank_does_not_know_is_known_to_none_and_the_reduction_stays_one_of_14():
    for known, calls, gain in launch.run(workers.heads, world=2, args=(2,)):
        assert known == [False] * READY + [True] * 2 + [False] * READY + [True] * 3
        assert set(calls) == {14}
        assert 1 <= gain <= 2


def test_a_rank_that_is_done_takes_part():
    (longer, one), (shorter, two) = launch.run(workers.uneven, world=2, args=(2,))
    assert one == two
    assert longer[: len(shorter)] == shorter
    assert [count for count, _ in longer] == [4] * (READY + 1) + [2] * 3
    assert [samples for _, samples in longer] == [0] * READY + [1, 2, 3, 4]


def test_what_cannot_be_weighed_is_a_typed_error():
    for outcome in launch.run(workers.refusals, world=2, args=(2,)):
        assert "ZeroRedundancyOptimizer keeps each on one" in outcome["ZeRO"]
        assert "first dimension" in outcome["columns"]
