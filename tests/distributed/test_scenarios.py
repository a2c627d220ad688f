"""Forty random trainings on two gloo processes, under DDP and under FSDP2, each against the plain float64 loop.

Of 1000 scenarios the worst relative error was ... in float64.
"""

import functools
from dataclasses import replace

import pytest
import scenario_oracle
import scenarios
from scenarios import MicroBatch

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


# ---- what the scenarios found, and are drawn around until it is mended ----

PLAIN = replace(
    scenarios.draw(0),
    world=2,
    double=True,
    net={"tied": False, "twice": False, "frozen": "", "branch": False, "never": False},
    left_out=False,
    optimizer="SGD",
    groups=[{"lr": 0.01, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}],
    foreach=None,
    tensor_lr=False,
    windows=[[MicroBatch(2 * t + i, 3 + 2 * i, False) for i in (0, 1)] for t in range(5)],
    sized=False,
    batch={"scale": "count"},
    rule="AdaScale",
    options={"estimator": "unbiased", "smoothing": 0.3, "noise_factor": None},
    lagged=False,
    reduction="mean",
    total=None,
    schedule=("", {}),
    set_to_none=True,
    clip=None,
    sync_every=True,
    bucket_view=False,
    by_layer=False,
    decays="auto",
)


def agrees(engine, **changes):
    scenario = replace(PLAIN, **changes)
    right = scenario_oracle.expected(scenario)
    for mine in launch.run(workers.training, world=2, args=(engine, scenario)):
        scenarios.check(mine, right, scenario, lambda *_: None)


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_the_plain_training(engine):
    agrees(engine)


@pytest.mark.xfail(strict=True, reason="lagged, each rank takes the others' micro-batches to be as large as its own")
def test_lagged_ranks_with_micro_batches_of_their_own_sizes_have_the_same_scale():
    agrees("DDP", lagged=True, sized=True, batch={"base_batch": 2.0, "micro_batch": 3.0})


@pytest.mark.xfail(strict=True, reason="zeroing a DTensor leaves its shard's version, so that it still looks stale")
def test_fsdp2_with_gradients_zeroed_in_place():
    agrees("FSDP2", set_to_none=False)


@pytest.mark.xfail(strict=True, reason="DDP gives .grad another tensor, whose version may be that of the stale one")
def test_ddp_with_gradients_zeroed_in_the_bucket():
    agrees("DDP", set_to_none=False, bucket_view=True)
