"""FSDP2 on real gloo processes, against the plain loop."""

import functools

import oracle
import pytest
import torch

from distributed import fsdp_workers as workers
from distributed import launch


@functools.cache
def parity(world):
    return launch.run(workers.parity, world=world, args=(world,))


CASES = {
    "accumulation 1": (1, 1.0),
    "accumulation 2": (2, 1.0),
    "accumulation 3": (3, 1.0),
    "accumulation 2, one sync": (2, 1.0),
    "accumulation 3, one sync": (3, 1.0),
    "S != N": (2, 0.25),
    "no reshard": (2, 1.0),
    "one unit": (2, 1.0),
    "CPU offload": (2, 1.0),
    "HSDP": (2, 1.0),
    "HSDP, one sync": (2, 1.0),
}


def assert_agrees(mine, *, samples, sample=1.0):
    gains, taus, weights = oracle.adascale(steps=13, counts=(samples,), sample=sample)
    assert mine["count"] == samples
    assert mine["gains"] == pytest.approx(gains, rel=1e-6)
    assert mine["taus"] == pytest.approx(taus, rel=1e-6)
    for p, w in zip(mine["parameters"], weights, strict=True):
        torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("world", "case"), [(w, case) for w in (2, 4) for case in CASES if w == 4 or "HSDP" not in case]
)
def test_agrees_with_algorithm_2(world, case):
    accumulation, sample = CASES[case]
    for result in parity(world):
        assert_agrees(result[case], samples=world * accumulation, sample=sample)


@pytest.mark.parametrize("world", [2, 4])
def test_trap_local_shards_must_be_summed_or_ranks_diverge_silently(world):
    first, *others = parity(world)
    for other in others:
        for case, mine in first.items():
            assert mine["gains"] == other[case]["gains"], case


@pytest.mark.parametrize("world", [2])
def test_mixed_precision_policies(world):
    """The reductions' type rounds the gradients; the gains stay those of the plain loop within that rounding."""
    gains, _, _ = oracle.adascale(steps=13, counts=(2 * world,))
    for result in launch.run(workers.mixed_precision, world=world, args=(world,)):
        for name, mine in result.items():
            half = "bfloat16" in name or "float16" in name
            assert mine == pytest.approx(gains, rel=0.05 if half else 1e-4), name


def test_a_compiled_model():
    for result in launch.run(workers.compiled, world=2, args=(2,)):
        assert_agrees(result, samples=4)


def test_a_shard_group_of_one_rank():
    (result,) = launch.run(workers.single, world=1, args=(1,))
    assert_agrees(result, samples=3)


def test_replicate():
    for result in launch.run(workers.replicated, world=2, args=(2,)):
        assert_agrees(result, samples=4)


def test_what_cannot_be_measured_is_a_typed_error():
    for outcome in launch.run(workers.refusals, world=2, args=(2,)):
        assert "FSDP2" in outcome["FSDP1"]
        assert "UnsupportedError" in outcome["partly sharded"]
        assert outcome["whole 2-D mesh"] == "ran: 2"
        assert "PowerSGD" in outcome["PowerSGD"]
        assert "Join([model, controller])" in outcome["join"]


def test_one_collective_of_twelve_numbers_a_step():
    for calls in launch.run(workers.collectives, world=2, args=(2,)):
        assert calls == [12, 12, 12]
