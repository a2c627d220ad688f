"""The Trainer with anybatch: the plain loop's training, on one process and two, killed and resumed."""

import math

import pytest
import torch
from distributed import launch

from anybatch.integrations.transformers import attach
from integrations import gpt, same, task
from integrations import transformers_workers as workers

DATA = task.STEPS * task.MICRO_BATCHES * task.SIZE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a run of one process, two micro-batches a step, and what that run found."""
    folder = tmp_path_factory.mktemp("killed")
    found = workers.train(0, 1, f"{folder}", accumulation=2, kill=task.KILLED)
    return f"{folder}/checkpoint-{task.KILLED}", found


@pytest.fixture(scope="module")
def two(tmp_path_factory, checkpoint):
    """What two processes found."""
    return launch.run(workers.all_of, world=2, args=(2, f"{tmp_path_factory.mktemp('two')}", checkpoint[0]))


@pytest.mark.parametrize(("name", "clip"), [("parity", None), ("clipped", 0.5)])
def test_is_the_plain_loop(name, clip, two, tmp_path):
    one = workers.train(0, 1, f"{tmp_path}", max_grad_norm=clip or 0.0)
    for ranks in ([one], [rank[name] for rank in two]):
        same.hold("Trainer", ranks, clip, examples=DATA)


def test_shards_train_as_the_plain_loop(two):
    same.hold("Trainer, FSDP2", [rank["sharded"] for rank in two], examples=DATA)


# The trainer finds its place in the data by steps: as many as there were, of the batch that it has now.
SKIPPED = {"examples": DATA, "left_out": task.SEEN}


def test_killed_and_resumed_on_two_processes_with_twice_the_batch(two, checkpoint):
    for rank in two:
        task.check_resumed(checkpoint[1], rank["resumed"], **SKIPPED)


def test_killed_and_resumed_in_shards_with_twice_the_batch(two):
    for rank in two:
        task.check_resumed(rank["sharded, killed"], rank["sharded, resumed"], **SKIPPED)


def test_a_loss_scale_that_changes_changes_no_gain(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    found = workers.train(0, 1, f"{tmp_path}", scaler=scaler)
    assert scaler.get_scale() > 1000
    task.check(found, task.plain(examples=DATA))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_half_precision_is_close_to_the_plain_loop(precision, tmp_path):
    options = {precision: True, "use_cpu": precision == "bf16", "data": workers.examples(task.singles())}
    options["scaler"] = task.scaler_of(precision)
    found = workers.train(0, 1, f"{tmp_path}", model=workers.Model(torch.float32), **options)
    task.check_close(found, task.plain(examples=DATA))


def test_the_last_smaller_step_of_an_epoch_is_a_mean_over_its_own(tmp_path):
    data = workers.examples()[: 30 * task.SIZE]
    found = workers.train(0, 1, f"{tmp_path}", data=data)
    # The Trainer takes the gradients' norm by clipping to none, so that a step smaller than the last is not measured.
    task.check(found, task.plain(epoch=30, examples=len(data), clip=math.inf))


def test_a_run_in_epochs_goes_on_at_four_times_the_batch(tmp_path):
    """By the trainer's own count it would be over at once: 20 steps are more than all epochs have at that batch."""
    data = workers.examples()[: 24 * task.SIZE]
    epochs = {"data": data, "max_steps": -1, "num_train_epochs": 2}
    killed = workers.train(0, 1, f"{tmp_path}", accumulation=1, kill=20, **epochs)
    found = workers.train(0, 1, f"{tmp_path}", accumulation=4, resume=f"{tmp_path}/checkpoint-20", **epochs)
    assert found["first"] == killed["taus"][-1] == 20
    assert 48 <= found["taus"][-1] < 52
    assert found["steps"] > 20 + 28 / 4


def test_a_loss_over_all_tokens_is_measured_by_them(two, tmp_path, record_property):
    """A GPT and sentences of unequal lengths: gains and weights are those of a loop that weighs by hand."""
    expected = workers.gpt_plain()
    for found in (workers.gpt_parity(0, 1, f"{tmp_path}"), *(rank["gpt"] for rank in two)):
        assert found["gains"] == pytest.approx(expected["gains"], rel=1e-6)
        for a, b in zip(found["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert len(found["gains"]) < 20 <= found["taus"][-1] < 24


def test_a_gpt_at_scale_8_learns_what_it_does_at_scale_1(tmp_path, record_property):
    task.as_launched(0, 1)
    held_out = gpt.collate(gpt.sentences(300, seed=99))
    losses = {1: [], 8: []}
    for scale, seed in ((s, seed) for s in losses for seed in range(2)):
        net = gpt.model(seed=seed)
        options = {
            "per_device_train_batch_size": 4 if scale == 1 else 8,
            "gradient_accumulation_steps": max(scale // 2, 1),
        }
        data = gpt.sentences(1400, seed=seed + 10)
        schedule = {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "learning_rate": 1e-2, "max_steps": 120}
        trainer = workers.gpt_trainer(f"{tmp_path}", net, data, **schedule, **options)
        adapter = attach(trainer, base_batch=4)
        trainer.train()
        assert adapter.controller.scale == scale
        assert adapter.controller.steps <= (120 if scale == 1 else 42)
        with torch.no_grad():
            lost, tokens = gpt.tokens_lost(net.eval(), held_out)
        losses[scale].append(float(lost) / tokens)
    one, eight = (sum(each) / len(each) for each in losses.values())
    record_property("worst loss of a GPT at scale 8 over that at scale 1", eight / one)
    assert 1.14 < one < 1.3  # of log(24) = 3.18 at first, and 1.14, what is left to chance
    assert abs(eight / one - 1) < 0.03  # seeds differ by 1 %
