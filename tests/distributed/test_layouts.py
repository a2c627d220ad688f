"""Random layouts on 1 to 8 ranks, each against a plain loop in float64 on one process.

The worst relative error was 2e-13 in float64.
"""

import functools

import pytest
import torch
from common import times

from distributed import launch
from distributed import layout_workers as workers

SEEDS = {1: range(times(8, 20)), 2: range(times(20, 60)), 4: range(times(22, 100)), 8: range(times(10, 60))}
CASES = [(world, seed) for world, seeds in SEEDS.items() for seed in seeds]
FIXED = {"style": "FSDP2", "shard": 2, "data": 2, "tp": 2, "units": ["up"], "frozen": None, "accumulation": 2}
FIXED |= {"sync": False, "reshard": True, "half": False, "adam": False, "metric": False, "same": False}
ADAM = {"adam": True, "metric": True}
NAMED = {
    "replicate() x TP": {"style": "replicate", "plan": "TP"},
    "fully_shard over (ranks, 1) x TP": {"style": "HSDP", "shard": 1, "plan": "TP+SP"},
    "TP, Adam's metric": {"style": "TP", "data": 1, "shard": 1, "tp": 4, "plan": "TP", **ADAM},
    "FSDP2 x TP, Adam's metric": {"plan": "TP", **ADAM, "same": True},
    "FSDP2 x TP with SequenceParallel, Adam's metric": {"plan": "TP+SP", **ADAM, "same": True},
    "FSDP2 x TP, a reduction in bfloat16": {"plan": "TP+SP", "half": True},
}
NAMED = {name: {**FIXED, **case} for name, case in NAMED.items()}


def cases(world):
    drawn = {seed: workers.draw(seed, world) for seed in SEEDS[world]}
    return {**drawn, **NAMED} if world == 4 else drawn


@functools.cache
def ranks(world):
    return launch.run(workers.train, world=world, args=(cases(world),))


@pytest.mark.parametrize(("world", "seed"), [*CASES, *((4, name) for name in NAMED)], ids=str)
def test_a_random_layout_trains_as_one_process(world, seed):
    case, (mine, *others) = cases(world)[seed], [each[seed] for each in ranks(world)]
    assert all(each["lines"] == mine["lines"] for each in others), case
    lines, weights, average, squares = workers.plain(case, mine)
    for t, (line, right) in enumerate(zip(mine["lines"], lines, strict=True)):
        # A sum over W ranks in bfloat16 rounds W + 1 times, each time by at most this part of the gradients' length.
        rounding = (case["data"] + 1) * workers.ROUNDING if case["half"] else 0.0
        square = 2 * rounding * squares[t] * case["data"] * case["accumulation"]
        assert line[:2] == pytest.approx(right[:2], rel=1e-10, abs=max(square, 1e-12)), case
        assert line[2:] == pytest.approx(right[2:], rel=1e-6 if case["half"] else 1e-10), case
        far = rounding * squares[t] ** 0.5 * workers.LR * line[2]
        for each in (mine, *others):
            for name, right_one in weights[t].items():
                found = each["weights"][t + 1][name]
                torch.testing.assert_close(found, right_one, rtol=1e-6 if case["half"] else 1e-10, atol=max(far, 1e-12))
    if not case["half"]:
        for each in (mine, *others):
            for name, right_one in average.items():
                torch.testing.assert_close(each["average"][name], right_one, rtol=1e-10, atol=1e-12)


def test_the_drawn_layouts_have_every_kind():
    drawn = [workers.draw(seed, world) for world, seed in CASES]
    for key, values in {"style": 5, "plan": 5, "tp": 3, "accumulation": 3, "half": 2, "metric": 2, "sync": 2}.items():
        assert len({case[key] for case in drawn}) == values, key
    assert {"HSDP", "FSDP2", "replicate"} <= {case["style"] for case in drawn if case["tp"] > 1 < case["data"]}
