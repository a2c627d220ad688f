"""The controller's state through torch.save and torch.distributed.checkpoint: any world size, and again and again."""

import functools
import math

import oracle
import pytest
import torch

import anybatch
from distributed import checkpoint_workers as workers
from distributed import launch


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of 4 ranks, and what its first rank saved."""
    path = str(tmp_path_factory.mktemp("checkpoint") / "four")
    first, *others = launch.run(workers.save, world=4, args=(path,))
    assert all(equal(first, other) for other in others)
    return path, first


def equal(a, b):
    """The same bits and the same types, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 8])
def test_saved_at_4_ranks_loaded_at_another_world_size(saved, world):
    path, expected = saved
    for loaded, raw, step in launch.run(workers.load, world=world, args=(world, path)):
        assert equal(loaded, expected)
        state, scale = expected["controller"], workers.SAMPLE * world
        theta = math.exp(-state["iterations"] / (0.01 * oracle.TOTAL)) if raw else 1.0  # one sample shows no noise
        variance, sqnorm = raw or (0.0, 0.0)
        weight = theta * state["weight"] + 1 - theta
        variance = (theta * state["variance"] + (1 - theta) * variance) / weight
        sqnorm = (theta * state["sqnorm"] + (1 - theta) * sqnorm) / weight
        assert step["scale"] == scale
        assert step["variance"] == pytest.approx(max(variance, 0), rel=1e-9)
        assert step["sqnorm"] == pytest.approx(max(sqnorm, 0), rel=1e-9)
        full = anybatch.gain(step["variance"], step["sqnorm"], scale)
        samples = state["samples"] + (1 if raw else 0)
        assert step["gain"] == pytest.approx(full ** (1 - math.sqrt(0.5) ** (samples + 1)), rel=1e-12)
        assert 1 < step["gain"] < scale
        assert step["tau"] == state["tau"] + step["gain"]
        assert step["steps"] == state["steps"] + 1


@functools.cache
def resumed(path, resumes, flat):
    first, second = launch.run(workers.resume, world=2, args=(path, resumes, 12, (1, 2), flat))
    assert equal(first, second)
    return first


@pytest.mark.parametrize("flat", [False, True])
def test_resuming_is_bit_exact_also_the_second_and_third_time(tmp_path, flat):
    whole = resumed("", (), False)
    assert equal(resumed(str(tmp_path), (1, 5, 8), flat), whole)


def test_trap_phantom_steps_of_distributed_checkpoint_move_nothing():
    for rank, outcome in enumerate(launch.run(workers.phantom_steps, world=2)):
        for name, (looks, steps, moved) in outcome.items():
            assert len(looks) == 3 - rank, name
            for before, *after in looks:
                assert all(equal(before, look) for look in after), name
            assert (steps, moved) == (2, 2), name


def test_the_state_as_a_plain_dictionary(tmp_path):
    for state, loaded, unpickled in launch.run(workers.stateful, world=2, args=(str(tmp_path),)):
        assert all(type(value) in (int, float) for value in state.values())
        assert equal(loaded, state)
        assert equal(unpickled, state)
