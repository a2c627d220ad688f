"""ModelEMA under FSDP2 and DDP: its state at other world sizes, without gathering; parameters that stay gathered."""

import pytest
import torch

from distributed import ema_workers as workers
from distributed import launch


def equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert value.keys() == b[key].keys()
            assert all(torch.equal(value[name], b[key][name]) for name in value)
        else:
            assert value == b[key]
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(("fsdp", 2), ("plain", 1)), (("plain", 1), ("fsdp", 2)), (("fsdp", 2), ("fsdp", 3))],
)
def test_through_distributed_checkpoint_at_another_world_size(saved, loaded, tmp_path):
    """A run that is stopped between two moves of the averages, goes on elsewhere, and ends as if it had not been."""
    path = str(tmp_path)
    (before, whole), *_ = launch.run(workers.save, world=saved[1], args=(*saved, path))
    assert (before["pending"], before["waiting"], before["tau"]) == (1.5, 1, 3.0)
    for after, end in launch.run(workers.load, world=loaded[1], args=(*loaded, path)):
        assert equal(after, before)
        assert equal(end, whole)


def test_shards_are_parts_of_the_whole():
    for rank, out in enumerate(launch.run(workers.shards, world=2, args=(2,))):
        rows = 3 if rank == 0 else 2
        assert out["local"]["0.weight"] == ((rows, 6), (5, 6))
        assert out["local"]["2.bias"] == ((2 - rank,), (3,))
        assert out["through weights_only"]
        assert out["of whole tensors"]
        assert out["imported"]
        assert out["listed"]
        assert out["names under DDP"] == list(out["local"])
        assert "torch.distributed.checkpoint" in out["into a plain model"]


def test_trap_parameters_that_fsdp_keeps_gathered():
    for outcome in launch.run(workers.gathered_parameters, world=2, args=(2,)):
        for case, found in outcome.items():
            assert found.pop("names") == ["0.bias", "0.weight", "2.bias", "2.weight"]
            assert all(found.values()), (case, found)


def test_trap_sharding_after_the_average_was_made_is_an_error():
    for messages in launch.run(workers.sharded_too_late, world=2, args=(2,)):
        assert len(messages) == 2
        assert all("after sharding" in message or "sharding the model" in message for message in messages)
