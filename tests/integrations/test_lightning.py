"""Lightning, by the callback: on one process and on two gloo processes."""

import functools

import pytest
from distributed import launch

from integrations import same, task

workers = pytest.importorskip("integrations.lightning_workers", exc_type=ModuleNotFoundError)
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore:.*LeafSpec:FutureWarning"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint") / "last.ckpt"


@functools.cache
def killed(path):
    """The first steps, of two micro-batches on one process."""
    return workers.train(accumulation=2, kill=task.KILLED, path=path)


@functools.cache
def two(path):
    killed(path)
    return launch.run(workers.all_of, world=2, args=(2, path))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_one_process_trains_as_the_plain_loop(clip):
    found = workers.train(gradient_clip_val=clip)
    assert found["asked"] == task.TOTAL
    same.hold("Lightning", [found], clip)


@pytest.mark.parametrize(("case", "clip"), [("parity", None), ("clipped", 0.5)])
def test_two_processes_train_as_the_plain_loop(path, case, clip):
    same.hold("Lightning", [found[case] for found in two(path)], clip)


def test_shards_train_as_the_plain_loop(path):
    same.hold("Lightning, FSDP2", [found["sharded"] for found in two(path)])


def test_killed_and_resumed_on_two_processes_with_twice_the_batch(path):
    before = killed(path)
    for found in two(path):
        task.check_resumed(before, found["resumed"])


def test_killed_and_resumed_in_shards_with_twice_the_batch(path):
    for found in two(path):
        # By the number of the batch, fifteen, the first step after it has one micro-batch on each process.
        task.check_resumed(found["sharded, killed"], found["sharded, resumed"], steps=task.KILLED + 1)
