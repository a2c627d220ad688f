"""ZeroRedundancyOptimizer on real gloo processes: the same as the optimizer that it shards."""

import functools

import pytest
import torch

from distributed import launch, zero_worker


@functools.cache
def parity():
    return launch.run(zero_worker.parity, world=2)


@pytest.mark.parametrize("name", zero_worker.CLASSES)
@pytest.mark.parametrize(
    ("tensor_lr", "by_closure"), [(False, False), (True, False), (False, True)], ids=["float", "tensor", "closure"]
)
def test_is_bitwise_the_optimizer_that_it_shards(name, tensor_lr, by_closure):
    for rank in parity():
        plain, zero = rank[name, tensor_lr, by_closure]
        assert plain["gains"] == zero["gains"]
        assert all(1 < gain < 4 for gain in zero["gains"])
        assert (plain["tau"], plain["rates"]) == (zero["tau"], zero["rates"])
        assert all(map(torch.equal, plain["parameters"], zero["parameters"]))


@pytest.mark.parametrize("name", ["AdamW", "Adagrad"])
def test_trap_step_counts_live_in_the_local_optimizer(name):
    for rank in parity():
        _, zero = rank[name, False, False]
        assert 0 < len(zero["counters"]) < 4  # a shard of the four parameters
        assert zero["counters"] == pytest.approx([zero["tau"]] * len(zero["counters"]), rel=1e-5)


def test_ranks_stay_bitwise_equal():
    first, second = parity()
    for case, (_, zero) in first.items():
        assert all(map(torch.equal, zero["parameters"], second[case][1]["parameters"]))


def test_refuses_what_the_local_class_or_the_overlap_makes_impossible():
    for messages in launch.run(zero_worker.refusals, world=2):
        assert len(messages) == 2
        assert "ASGD cannot be scaled" in messages[0]
        assert "overlap_with_ddp" in messages[1]
