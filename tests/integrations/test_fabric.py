"""Fabric, with plain `attach`: on one process and on two gloo processes."""

import csv
import functools

import pytest
from distributed import launch

from integrations import same, task

workers = pytest.importorskip("integrations.fabric_workers", exc_type=ModuleNotFoundError)
from lightning.fabric.loggers import CSVLogger


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


killed = functools.cache(workers.killed)


@functools.cache
def two(folder):
    killed(folder)
    return launch.run(workers.all_of, world=2, args=(2, folder))


@pytest.mark.parametrize(("clip", "around"), [(None, True), (0.5, False)])
def test_one_process_trains_as_the_plain_loop(clip, around):
    same.hold("Fabric", [workers.parity(clip=clip, around=around)], clip)


@pytest.mark.parametrize(("case", "clip"), [("parity", None), ("clipped", 0.5)])
def test_two_processes_train_as_the_plain_loop(folder, case, clip):
    same.hold("Fabric", [found[case] for found in two(folder)], clip)


def test_killed_and_resumed_on_two_processes_with_twice_the_batch(folder):
    before = killed(folder)
    for found in two(folder):
        task.check_resumed(before, found["resumed"])


def test_fabrics_logger_gets_the_numbers_of_each_step(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    found = workers.parity(logger=logger)
    logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        task.check_logged([{k: v for k, v in row.items() if v} for row in csv.DictReader(file)], found)
