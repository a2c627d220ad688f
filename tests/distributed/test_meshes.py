"""Tensor and sequence parallelism, with FSDP2 and alone: the same micro-batches as one process, by another engine."""

import functools
import itertools

import pytest
import torch

from distributed import launch
from distributed import mesh_workers as workers

# Ranks, and the layouts that share a launch.
WORLDS = {
    2: ("TP", "TP+SP", "TP+SP, loss parallel", "TP, tied"),
    4: ("FSDP2xTP", "FSDP2xTP+SP", "FSDP2xTP+SP, loss parallel", "FSDP2xTP, tied"),
    8: ("HSDPxTP+SP",),
}
CASES = [(world, name) for world, names in WORLDS.items() for name in names]


@functools.cache
def routes(world):
    return launch.run(workers.routes, world=world, args=(world, WORLDS[world]))


@functools.cache
def one_process(tied, accumulation, optimizer):
    return workers.train(workers.made(tied=tied), accumulation=accumulation, make=optimizer)


@pytest.mark.parametrize(("accumulation", "optimizer"), workers.RUNS)
@pytest.mark.parametrize(("world", "name"), CASES)
def test_a_layout_trains_as_one_process(world, name, accumulation, optimizer):
    """Counts, gains, moments, clock, weights and model average of each step, in float64."""
    data = world // 2 if "xTP" in name else 1
    expected = one_process("tied" in name, data * accumulation, optimizer)
    for found in routes(world):
        mine = found[name, accumulation]
        for step, right in zip(mine["steps"], expected["steps"], strict=True):
            assert step == pytest.approx(right, rel=1e-10, nan_ok=data * accumulation == 1)
        for what in ("weights", "average"):
            for key, right in expected[what].items():
                torch.testing.assert_close(mine[what][key], right, rtol=1e-10, atol=1e-12)


def test_gains_are_bitwise_equal_on_all_ranks():
    first, *others = routes(4)
    for other in others:
        for case, found in first.items():
            assert found["steps"] == other[case]["steps"], case


def test_layers_add_up_over_the_mesh(tmp_path):
    """The layers of a record are those of one process, at the same micro-batches."""
    import anybatch

    model = workers.made()
    record = anybatch.RunRecord(tmp_path / "run.jsonl", per_layer=2)
    workers.train(model, accumulation=4, record=record)
    expected = [step.per_layer for step in anybatch.read_record(tmp_path / "run.jsonl").steps]
    found, *_ = launch.run(workers.layers, world=4, args=(4,))
    assert [bool(step) for step in found] == [True, False, True, False]
    for step, right in zip(found, expected, strict=True):
        assert list(step) == list(right)
        for name, moments in step.items():
            assert (moments.variance, moments.sqnorm) == pytest.approx(
                (right[name].variance, right[name].sqnorm), rel=1e-9, abs=1e-12
            )


@functools.cache
def resumes():
    return launch.run(workers.resumes, world=4, args=(4,))


@pytest.mark.parametrize("pair", workers.RESUMES, ids=" to ".join)
def test_a_run_continues_in_another_layout(pair):
    """Four steps, a checkpoint of whole tensors, and four steps: as eight steps of one process."""
    expected = workers.train(workers.made(), accumulation=workers.SAMPLES, make=torch.optim.AdamW, steps=8)
    for found in resumes():
        mine = found[pair]
        for step, right in zip(mine["steps"], expected["steps"], strict=True):
            assert step == pytest.approx(right, rel=1e-10)
        for what in ("weights", "average"):
            for key, right in expected[what].items():
                torch.testing.assert_close(mine[what][key], right, rtol=1e-10, atol=1e-12)


REFUSED = {
    "TP under DDP": "UnsupportedError: A trained parameter of shape [8, 8] under DistributedDataParallel",
    "TP and nothing over the other ranks": "UsageError: The mesh of the parameters has (2,) ranks, and the world 4",
    "a part outside of FSDP2": "UnsupportedError: Nothing averages a trained parameter of shape [12, 8]",
    "dense parts on two meshes": "UnsupportedError: FSDP2 shards the modules over different meshes of 4 ranks",
    "TP on two meshes": "UnsupportedError: The trained parameters lie on meshes of [2, 4] ranks",
}


@functools.cache
def refused():
    return launch.run(workers.refused, world=4, args=(4,))


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_layout_is_an_error_on_every_rank(name):
    for found in refused():
        assert found[name].startswith(REFUSED[name])


def test_torch_takes_dtensors_out_of_a_module_under_ddp():
    """The reason for the error: eight entries before the first forward, and three after it."""
    for found in refused():
        assert found["entries"] == (8, 3)


@pytest.mark.parametrize("odd", range(4))
def test_a_rank_that_differs_is_an_error_on_every_rank(odd):
    for found in differing():
        assert "attach was given another base_batch on other ranks" in found["base_batch", odd]
        assert "different clocks, averages, learning rates" in found["lr", odd]


@functools.cache
def differing():
    return launch.run(workers.differing, world=4, args=(4,))


def test_every_difference_of_checksums_is_seen():
    """A half of an odd sum must not be rounded to that of equal numbers, as for 0, 0, 0 and 1."""
    values = [list(numbers) for numbers in itertools.product(range(3), repeat=4)] + [[65535] * 4, [65535] * 3 + [65534]]
    for found in launch.run(workers.checksums, world=4, args=(4, values)):
        for numbers, error in zip(values, found, strict=True):
            assert (error == "equal") == (len(set(numbers)) == 1), numbers


def test_one_all_reduce_of_twelve_numbers_a_step():
    for sizes in launch.run(workers.collectives, world=4, args=(4,)):
        assert sizes.count(12) == workers.STEPS
