"""Tensor and sequence parallelism, with FSDP2 and alone: the same micro-batches as one process, by another engine."""

import functools

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
    return workers.train(workers.made(tied=tied), accumulation=accumulation, make=getattr(torch.optim, optimizer))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("world", "name"), CASES)
def test_a_layout_trains_as_one_process(world, name, accumulation, optimizer):
    """Counts, gains, moments, clock, weights and model average of each step, in float64."""
    data = world // 2 if "xTP" in name else 1
    expected = one_process("tied" in name, data * accumulation, optimizer)
    for found in routes(world):
        mine = found[name, accumulation, optimizer]
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


@pytest.mark.parametrize(("first", "second"), [("FSDP2xTP", "FSDP2xTP+SP"), ("FSDP2xTP+SP", "TP"), ("TP", "FSDP2xTP")])
def test_a_state_goes_on_in_another_layout(first, second):
    """A state has no shapes: after four steps in one layout, four in another count on from the same clock."""
    state = launch.run(workers.resumed, world=4, args=(4, first, second, None))[0]
    found = launch.run(workers.resumed, world=4, args=(4, first, second, state))[0]
    assert found["steps"] == 8
    assert found["tau"] > state["tau"]


def test_adams_metric_is_refused_under_tensor_parallelism():
    for found in launch.run(workers.refused, world=4, args=(4,)):
        assert "works without tensor parallelism" in found["metric"]


def test_one_all_reduce_of_twelve_numbers_a_step():
    for sizes in launch.run(workers.collectives, world=4, args=(4,)):
        assert sizes.count(12) == workers.STEPS
