"""Accelerate, with plain `attach`: on one process and on two gloo processes."""

import functools

import pytest
import torch
from distributed import launch

import anybatch
from integrations import same, task

workers = pytest.importorskip("integrations.accelerate_workers", exc_type=ModuleNotFoundError)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate", "ignore::FutureWarning:accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@functools.cache
def killed(folder):
    """One process, two micro-batches a step."""
    return workers.killed(0, 1, folder)


@functools.cache
def two(folder):
    killed(folder)
    return launch.run(workers.all_of, world=2, args=(2, folder))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_one_process_trains_as_the_plain_loop(clip):
    same.hold("Accelerate", [workers.parity(clip=clip)], clip)


@pytest.mark.parametrize(("case", "clip"), [("parity", None), ("clipped", 0.5), ("around", None)])
def test_two_processes_train_as_the_plain_loop(folder, case, clip):
    same.hold("Accelerate", [found[case] for found in two(folder)], clip)


def test_a_prepared_scheduler_that_the_loop_steps_ends_with_the_run(folder):
    for found in two(folder):
        end = found["end"]
        assert end["scale"] == 2
        task.check_end(end, total=400)
        assert end["lr"] < 1e-5


def test_killed_and_resumed_on_two_processes_with_twice_the_batch(folder):
    before = killed(folder)
    for found in two(folder):
        task.check_resumed(before, found["resumed"])
        assert found["resumed"]["rate"] == before["rate"]


def test_shards_train_as_the_plain_loop(folder):
    same.hold("Accelerate, FSDP2", [found["sharded"] for found in two(folder)])


def test_killed_and_resumed_in_shards_with_twice_the_batch(folder):
    for found in two(folder):
        task.check_resumed(found["sharded, killed"], found["sharded, resumed"])


def test_what_is_left_at_the_end_of_an_epoch_is_a_smaller_step():
    """Fifteen batches: steps of 4, 4, 4 and 3, each loss divided by 4."""
    task.check(workers.parity(loader=task.short(15)), task.plain(epoch=15))


def test_a_loss_scale_that_changes_changes_no_gain():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    found = workers.parity(scaler=scaler)
    assert scaler.get_scale() > 1000
    task.check(found, task.plain())


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_half_precision_is_close_to_the_plain_loop(precision):
    task.check_close(workers.parity(precision=precision, scaler=task.scaler_of(precision)), task.plain())


def test_a_model_that_was_not_prepared_is_an_error_that_names_the_one_that_was(folder):
    for found in two(folder):
        assert "accelerator.prepare" in found["unprepared"]


def test_a_prepared_scheduler_that_attach_was_not_given_is_warned_of():
    accelerator, model, optimizer, loader, scheduler, controller = workers.prepared(accumulation=4)
    controller.detach()
    controller = anybatch.attach(optimizer, model=model, total=4, base_batch=task.SIZE, micro_batch=task.SIZE)
    with pytest.warns(anybatch.AnybatchWarning, match="was not passed to attach"):
        workers.train(accelerator, model, optimizer, loader, scheduler, controller)
    assert scheduler.scheduler.last_epoch == controller.steps


def test_accelerates_tracker_gets_the_numbers_of_each_step():
    from accelerate.tracking import GeneralTracker, on_main_process

    told = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "told", False, None

        @on_main_process
        def log(self, values, step=None, **_):
            told.append(values)

    task.check_logged(told, workers.parity(tracker=Tracker()))
