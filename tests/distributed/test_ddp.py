"""DistributedDataParallel on real gloo processes, against the plain loop."""

import functools

import oracle
import pytest
import torch

import anybatch
from distributed import launch, workers


@functools.cache
def parity(world):
    return launch.run(workers.parity, world=world, args=(world,))


@functools.cache
def faults():
    return launch.run(workers.faults, world=2, args=(2,))


CASES = {
    "accumulation 1": (1, 1.0),
    "accumulation 2": (2, 1.0),
    "accumulation 3": (3, 1.0),
    "S != N": (2, 0.25),
    "bucket views": (2, 1.0),
    "static graph": (1, 1.0),
    "many buckets": (2, 1.0),
    "find unused": (2, 1.0),
    "own hook": (2, 1.0),
    "compiled before DDP": (2, 1.0),
    "compiled after DDP": (2, 1.0),
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_algorithm_2(world, case):
    accumulation, sample = CASES[case]
    gains, taus, weights = oracle.adascale(steps=13, counts=(world * accumulation,), sample=sample)
    for result in parity(world):
        mine = result[case]
        assert mine["gains"] == pytest.approx(gains, rel=1e-6)
        assert mine["taus"] == pytest.approx(taus, rel=1e-6)
        assert (mine["count"], mine["scale"]) == (world * accumulation, world * accumulation * sample)
        for p, w in zip(mine["parameters"], weights, strict=True):
            torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_gains_and_parameters_are_bitwise_equal_on_all_ranks(world):
    first, *others = parity(world)
    for other in others:
        for case, mine in first.items():
            assert mine["gains"] == other[case]["gains"], case
            assert all(map(torch.equal, mine["parameters"], other[case]["parameters"])), case


@pytest.mark.parametrize("case", ["float32", "fp16 hook"])
def test_rounded_gradients_stay_close(case):
    accumulation = 2 if case == "float32" else 1
    gains, _, _ = oracle.adascale(steps=13, counts=(2 * accumulation,))
    assert parity(2)[0][case]["gains"] == pytest.approx(gains, rel=1e-4 if case == "float32" else 0.02)


def test_one_collective_of_twelve_numbers_a_step():
    for calls in launch.run(workers.collectives_per_step, world=2, args=(2,)):
        assert calls == [12, 12, 12]


def test_unused_and_frozen_parameters():
    for variance, sqnorm, expected_variance, expected_sqnorm in launch.run(
        workers.unused_and_frozen, world=2, args=(2,)
    ):
        assert variance == pytest.approx(expected_variance, rel=1e-9)
        assert sqnorm == pytest.approx(max(expected_sqnorm, 0), rel=1e-9)


def test_trap_non_finite_gradient_on_one_rank_skips_the_step_on_all():
    for outcome in faults():
        skipped, steps, stood_still, variance = outcome["skipped"]
        assert (skipped, steps, stood_still) == (1, 1, True)
        assert variance > 0
        assert outcome["after the skip"][0] == 2
        assert outcome["after the skip"] == faults()[0]["after the skip"]


@pytest.mark.parametrize("rule", ["AdaScale", "Linear"])
def test_trap_a_rank_whose_count_differs_is_an_error_on_all_ranks(rule):
    for rank, outcome in enumerate(faults()):
        assert f"this rank: {1 + rank}, all 2 ranks: 3" in outcome[f"counts differ, {rule}"]


def test_gradients_that_were_never_averaged_are_an_error():
    assert all("no_sync" in outcome["never synchronised"] for outcome in faults())


def test_several_ranks_without_ddp_are_an_error_or_one_rank_each():
    for outcome in faults():
        assert "DistributedDataParallel" in outcome["no DDP"]
        assert outcome["alone"] == 2


def test_fixed_rules_count_over_ranks():
    assert all(outcome["fixed rule"] == (6, 6, 6) for outcome in faults())


def test_process_groups():
    results = launch.run(workers.subgroup, world=4, args=(4,))
    assert [count for count, _ in results] == [2, 2, 2, 2]
    assert results[0] == results[1] != results[2] == results[3]


def test_one_rank_writes_the_record(tmp_path):
    launch.run(workers.record, world=2, args=(2, str(tmp_path / "run.jsonl")))
    run = anybatch.read_record(tmp_path / "run.jsonl")
    assert [step.step for step in run.steps] == [1, 2, 3, 4, 5]
    assert (run.torn, run.config["ranks"]) == (0, 2)


def test_every_rank_may_log_where_one_was_given_the_record(tmp_path):
    launch.run(workers.record_of_one, world=2, args=(2, str(tmp_path / "run.jsonl")))
    assert [line.values for line in anybatch.read_record(tmp_path / "run.jsonl").metrics] == [{"accuracy": 0.5}]


def test_trap_join_beside_what_follows_the_clock():
    results = launch.run(workers.followed_join, world=2, args=(2,))
    assert results[0] == results[1]
    refused, steps, tau = results[0]
    assert len(refused) == 2
    assert all("ModelEMA" in message for message in refused)
    assert (steps, 2 <= tau <= 4) == (2, True)
