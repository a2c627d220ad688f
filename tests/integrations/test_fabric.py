"""Fabric, with plain `attach`: on one process and on two gloo processes."""

import functools

import pytest
from distributed import launch

from integrations import task

workers = pytest.importorskip("integrations.fabric_workers", exc_type=ModuleNotFoundError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


killed = functools.cache(workers.killed)
plain = functools.cache(task.plain)


@functools.cache
def two(folder):
    killed(folder)
    return launch.run(workers.all_of, world=2, args=(2, folder))


@pytest.mark.parametrize(("clip", "around"), [(None, True), (0.5, False)])
def test_one_process_trains_as_the_plain_loop(clip, around, record_property):
    found = workers.parity(clip=clip, around=around)
    record_property("worst difference, Fabric", task.check(found, plain(clip=clip)))


@pytest.mark.parametrize(("case", "clip"), [("parity", None), ("clipped", 0.5)])
def test_two_processes_train_as_the_plain_loop(folder, case, clip, record_property):
    for found in two(folder):
        record_property("worst difference, Fabric", task.check(found[case], plain(clip=clip)))


def test_killed_and_resumed_on_two_processes_with_twice_the_batch(folder):
    before = killed(folder)
    for found in two(folder):
        task.check_resumed(before, found["resumed"])
