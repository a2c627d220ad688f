"""Forty random trainings on two gloo processes, under DDP and under FSDP2, each against the plain float64 loop.

Of 1000 scenarios the worst relative error was ... in float64.
"""

import functools
from dataclasses import replace

import pytest
import scenario_oracle
import scenarios

from distributed import launch
from distributed import scenario_workers as workers

SEEDS = range(40)


@functools.cache
def trainings(engine):
    return launch.run(workers.trainings, world=2, args=(engine, SEEDS))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_a_random_training_on_two_ranks_is_the_plain_loops(engine, seed, record_property):
    scenario = scenarios.draw(seed, engine=engine, world=2)
    right = scenario_oracle.expected(scenario)
    first, second = (of_rank[seed] for of_rank in trainings(engine))
    for mine in (first, second):
        scenarios.check(mine, right, scenario, record_property)
    for a, b in zip(first["lines"], second["lines"], strict=True):  # the same bits on both ranks; nan is nan
        assert all(repr(a[name]) == repr(b[name]) for name in ("gain", "tau", "lr", "average"))


@pytest.mark.xfail(strict=True, reason="lagged, each rank takes the others' micro-batches to be as large as its own")
def test_lagged_ranks_with_micro_batches_of_their_own_sizes_keep_the_same_scale():
    scenario = scenarios.draw(4, engine="DDP", world=2)
    assert scenario.lagged
    assert scenario.sized
    windows = [[replace(m, size=1 + m.index % 5) for m in window] for window in scenario.windows]
    scenario = replace(scenario, windows=windows)
    first, second = launch.run(workers.training, world=2, args=("DDP", scenario))
    assert [line["scale"] for line in first["lines"]] == [line["scale"] for line in second["lines"]]


@pytest.mark.xfail(strict=True, reason="zeroing a DTensor leaves its shard's version, so cleared gradients look stale")
def test_fsdp2_with_gradients_zeroed_in_place():
    scenario = replace(scenarios.draw(2, engine="FSDP2", world=2), set_to_none=False)
    right = scenario_oracle.expected(scenario)
    for mine in launch.run(workers.training, world=2, args=("FSDP2", scenario)):
        scenarios.check(mine, right, scenario, lambda *_: None)
