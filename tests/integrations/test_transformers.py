"""The Trainer with anybatch: the plain loop's training, on one process and two, killed and resumed."""

import pytest
from distributed import launch

from integrations import task
from integrations import transformers_workers as workers

DATA = task.STEPS * task.MICRO_BATCHES * task.SIZE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a run of one process that was killed after fifteen steps, two micro-batches each."""
    folder = tmp_path_factory.mktemp("killed")
    found = workers.train(0, 1, f"{folder}", accumulation=2, kill=15)
    assert len(found["taus"]) == 15
    return f"{folder}/checkpoint-15", found["taus"][-1]


@pytest.fixture(scope="module")
def two(tmp_path_factory, checkpoint):
    """What two processes found."""
    return launch.run(workers.all_of, world=2, args=(2, f"{tmp_path_factory.mktemp('two')}", checkpoint[0]))


@pytest.mark.parametrize(("name", "clip"), [("parity", None), ("clipped", 0.5)])
def test_is_the_plain_loop(name, clip, two, tmp_path, record_property):
    expected = task.plain(clip=clip, examples=DATA)
    one = workers.train(0, 1, f"{tmp_path}", max_grad_norm=clip or 0.0)
    for found in (one, *(rank[name] for rank in two)):
        worst = task.check(found, expected)
        record_property("worst difference of the Trainer to the plain loop", worst)


def test_a_killed_run_goes_on_at_the_same_tau_with_twice_the_batch_on_two_processes(two, checkpoint):
    for rank in two:
        assert rank["resumed"]["first"] == checkpoint[1]
        assert rank["resumed"]["scale"] == 4
        task.check_end(rank["resumed"])
