"""What surrounds a step of the Trainer: limits, schedules, logs, averages, checkpoints, retries, and what cannot be."""

import doctest
import math
import re
import warnings

import pytest
import torch
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import anybatch
from anybatch.integrations import _sequences
from anybatch.integrations import transformers as adapter_module
from anybatch.integrations.transformers import AnyBatchArguments, attach
from integrations import gpt, task
from integrations import transformers_workers as workers


@pytest.fixture(autouse=True)
def _one_process():
    task.as_launched(0, 1)


@pytest.fixture
def made(tmp_path):
    """A trainer of 4 micro-batches a step and a base batch of one, and its callback."""

    def made(
        model=None, *, base_batch=task.SIZE, ema_decay=None, rule="AdaScale", record=None, per_layer=None, **options
    ):
        trainer = workers.trainer_of(f"{tmp_path}", model, **{"max_steps": 20, **options})
        return trainer, attach(trainer, base_batch, ema_decay=ema_decay, rule=rule, record=record, per_layer=per_layer)

    return made


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **_):
        self.logs.append(dict(logs))


def test_the_reporters_and_the_trainers_own_log_get_the_numbers_of_each_step(made):
    reporter = Reporter()
    trainer, adapter = made(callbacks=[reporter], logging_strategy="steps", logging_steps=1)
    trainer.train()
    own = trainer.state.log_history
    assert len(reporter.logs) == len(own) == adapter.controller.steps + 1  # and the summary
    for log in (*reporter.logs, *own):
        assert 1 <= log["anybatch/gain"] <= log["anybatch/scale"] == 4
        assert all(math.isfinite(x) for name, x in log.items() if name.startswith("anybatch"))
    assert own[-1]["anybatch/tau"] == adapter.controller.tau
    assert "anybatch/noise_scale" in own[-1]
    seen = own[-1]["train_samples_per_second"] * own[-1]["train_runtime"]
    assert seen == pytest.approx(adapter.controller.steps * 4 * task.SIZE, rel=0.05)  # both are rounded
    before_any = {}
    adapter.controller = anybatch.attach(
        trainer.optimizer.optimizer, model=trainer.model, scale="count"
    )  # nothing is known: what is not finite is left out
    adapter.on_log(trainer.args, trainer.state, trainer.control, logs=before_any)
    assert set(before_any) == {"anybatch/tau"}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_epochs_warm_up_and_schedule_are_those_of_the_base_batch(micro_batches, made):
    data = workers.examples()[: 10 * task.SIZE]
    trainer, adapter = made(
        data=data,
        max_steps=-1,
        num_train_epochs=2.5,
        warmup_steps=0.2,
        lr_scheduler_type="linear",
        gradient_accumulation_steps=micro_batches,
    )
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            rates.append((adapter.controller.tau, trainer.optimizer.param_groups[0]["lr"]))

    trainer.add_callback(Rates())
    trainer.train()
    total = math.ceil(2.5 * len(data) / task.SIZE)
    assert adapter.controller.clock.total == total == 25
    assert total <= adapter.controller.tau < total + micro_batches
    for tau, rate in rates:
        at = math.floor(tau)
        expected = min(at / 5, (total - at) / (total - 5))
        assert rate == pytest.approx(task.oracle.LR * expected, rel=1e-9)
    assert trainer.state.max_steps == total
    assert trainer.state.global_step == adapter.controller.steps == len(rates)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, micro_batches):
        self.examples = workers.examples()[: micro_batches * task.SIZE]

    def __iter__(self):
        return iter(self.examples)


def test_a_stream_begins_again_and_what_is_left_of_it_is_in_no_step(made):
    trainer, adapter = made(data=Stream(6))
    counts, first = [], []

    class Counts(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            first.append([p.grad.clone() for p in trainer.model.parameters()])

        def on_step_end(self, *_, **__):
            counts.append(adapter.controller.count)

    trainer.add_callback(Counts())
    trainer.train()
    assert counts == [4] * adapter.controller.steps
    assert 20 <= adapter.controller.tau < 24
    assert trainer.state.epoch > 3
    trainer, adapter = made(data=Stream(6), learning_rate=0.0, max_steps=3, optimizer=False, optim="sgd")
    trainer.add_callback(Counts())
    first.clear()
    trainer.train()
    for step in first[1:]:  # the same weights and the same four micro-batches in each epoch
        for a, b in zip(step, first[0], strict=True):
            torch.testing.assert_close(a, b)


def test_a_batch_smaller_than_the_base_batch_takes_more_steps_than_max_steps(made):
    trainer, adapter = made(base_batch=8, gradient_accumulation_steps=1, rule=anybatch.AdaScale(consecutive=True))
    trainer.train()
    assert adapter.controller.scale == 0.5
    assert trainer.state.global_step == adapter.controller.steps > 20
    assert 20 <= adapter.controller.tau < 21


@pytest.mark.parametrize("bar", [True, False])
def test_a_line_below_the_bar_says_how_many_steps_the_run_took(bar, made, capsys):
    trainer, adapter = made(disable_tqdm=not bar)
    trainer.train()
    lines = [line for line in re.split("[\r\n]+", capsys.readouterr().err) if line.startswith("anybatch: ")]
    expected = f"anybatch: {trainer.state.global_step} steps for 20 base iterations, tau = {adapter.controller.tau:g}."
    assert lines == ([expected] if bar else [])


def test_the_end_evaluates_and_saves_as_the_trainers_own_does(made, tmp_path):
    trainer, adapter = made(
        eval_dataset=workers.examples()[:8],
        eval_strategy="steps",
        eval_steps=1000,
        save_strategy="steps",
        save_steps=1000,
        label_names=["y"],
    )
    trainer.train()
    steps = adapter.controller.steps
    assert steps < 20
    assert any("eval_loss" in log and log["step"] == steps for log in trainer.state.log_history)
    assert get_last_checkpoint(f"{tmp_path}").endswith(f"checkpoint-{steps}")


def test_a_second_train_is_a_run_of_its_own_and_leaves_what_the_user_gave(made, tmp_path):
    model = workers.Model()
    trainer = workers.trainer_of(f"{tmp_path}", model, max_steps=20)
    schedule = task.scheduler_of(trainer.optimizer, 1000)
    trainer.lr_scheduler = schedule
    with pytest.warns(anybatch.AnybatchWarning, match="does not fit total"):
        adapter = attach(trainer, task.SIZE)
        trainer.train()
    first = adapter.controller
    assert trainer.lr_scheduler is schedule
    assert schedule.last_epoch == math.floor(first.tau)
    trainer.lr_scheduler = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the scheduler of the first run has its initial_lr there
        trainer.train()
    assert adapter.controller is not first
    assert not isinstance(trainer.lr_scheduler, anybatch.HeldScheduler)
    for controller in (first, adapter.controller):
        assert 20 <= controller.tau < 24
        assert "detached" in repr(controller)


class TooLarge(workers.Model):
    """More than two examples do not fit, which shows in the second backward."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x, y):
        self.seen += 1
        if len(x) > 2 and self.seen > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x, y)


def test_a_batch_that_does_not_fit_is_tried_again_smaller(made):
    trainer, adapter = made(TooLarge(), auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.train_batch_size == 2
    assert adapter.controller.scale == 2
    assert 20 <= adapter.controller.tau < 22


def losses(trainer):
    with torch.no_grad():
        return float(trainer.model(*map(torch.stack, zip(*((e["x"], e["y"]) for e in trainer.eval_dataset))))["loss"])


def test_evaluations_are_of_the_average_which_a_checkpoint_keeps(made, tmp_path):
    options = {"eval_dataset": workers.examples()[:8], "label_names": ["y"], "per_device_eval_batch_size": 8}
    trainer, adapter = made(ema_decay=0.9, save_strategy="steps", save_steps=3, **options)
    trainer.train()
    mine = losses(trainer)
    with adapter.ema.applied():
        average = losses(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(average)
    assert losses(trainer) == mine != pytest.approx(average)
    weights = [p.clone() for p in adapter.ema.state_dict()["averages"].values()]

    again, resumed = made(ema_decay=0.9, **options)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    for a, b in zip(weights, resumed.ema.state_dict()["averages"].values(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "checkpoint-3" / "anybatch_ema.pt").unlink()
    again, _ = made(ema_decay=0.9, **options)
    with pytest.raises(anybatch.StateError, match="no average of anybatch"):
        again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    with pytest.raises(anybatch.UsageError, match="load_best_model_at_end"):
        made(ema_decay=0.9, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", **options)


def test_a_checkpoint_of_a_run_without_it_is_refused(made, tmp_path):
    bare = workers.trainer_of(f"{tmp_path}", max_steps=2, save_strategy="steps", save_steps=2)
    bare.train()
    trainer, _ = made()
    with pytest.raises(anybatch.StateError, match="no state of anybatch"):
        trainer.train(resume_from_checkpoint=True)
    assert not isinstance(trainer.lr_scheduler, anybatch.HeldScheduler)


def test_a_checkpoint_of_the_model_alone_does_not_begin_the_clock_anew(made, tmp_path):
    trainer, _ = made(save_strategy="steps", save_steps=3, save_only_model=True)
    trainer.train()
    again, _ = made()
    with pytest.raises(anybatch.UsageError, match="load the scheduler's state"):
        again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")


def test_a_run_that_is_over_stays_as_it_is_when_resumed(made, tmp_path):
    trainer, first = made(save_strategy="steps", save_steps=1000)
    trainer.train()
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    again, adapter = made()
    with pytest.warns(anybatch.AnybatchWarning, match="is done there"):
        again.train(resume_from_checkpoint=True)
    assert adapter.controller.tau == first.controller.tau
    assert adapter.controller.steps == first.controller.steps == again.state.global_step
    for before, p in zip(weights, again.model.parameters(), strict=True):
        assert torch.equal(before, p)


def test_restored_callbacks_do_not_replace_it(made, tmp_path):
    options = {"restore_callback_states_from_checkpoint": True, "save_strategy": "steps", "save_steps": 2}
    trainer, first = made(**options)
    trainer.train()
    again, adapter = made(**options)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert adapter.controller.tau == first.controller.tau
    assert adapter.controller.steps == first.controller.steps


def test_a_schedule_that_runs_on_a_metric_is_the_trainers(made):
    trainer, adapter = made(
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_dataset=workers.examples()[:8],
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        label_names=["y"],
    )
    trainer.train()
    assert isinstance(trainer.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    assert trainer.lr_scheduler.last_epoch == adapter.controller.steps // 2 + 1
    assert 20 <= adapter.controller.tau < 24


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = True


def test_a_run_that_stops_early_says_so(made):
    trainer, adapter = made(callbacks=[Stops()])
    with pytest.warns(anybatch.AnybatchWarning, match="stopped at tau = 1.* of 20"):
        trainer.train()
    assert adapter.controller.steps == 1


class Elsewhere(workers.Model):
    """A loss that does not depend on what is trained."""

    def __init__(self):
        super().__init__()
        self.other = torch.zeros((), requires_grad=True)

    def forward(self, x, y):
        return {"loss": self.other * 1.0}


def test_a_run_in_which_nothing_is_measured_is_an_error_at_the_first_step(made):
    trainer, _ = made(Elsewhere())
    with pytest.raises(anybatch.UsageError, match="enable_input_require_grads"):
        trainer.train()

    trainer, adapter = made()

    class Unhooked(TrainerCallback):
        def on_train_begin(self, *_, **__):
            trainer.optimizer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)

    trainer.add_callback(Unhooked())
    with pytest.raises(anybatch.UsageError, match=r"no hook on trainer\.optimizer was called"):
        trainer.train()
    assert adapter.controller.steps == 0


def test_what_cannot_be_is_an_error_that_says_what_to_do(made):
    trainer, adapter = made()
    with pytest.raises(anybatch.UsageError, match="attached already"):
        attach(trainer, base_batch=4)
    late = workers.trainer_of(trainer.args.output_dir)
    late.is_in_train = True
    with pytest.raises(anybatch.UsageError, match="attach before it"):
        attach(late, base_batch=4)
    with pytest.raises(anybatch.InvalidValueError, match="SquareRoot"):
        made(rule="cubic")
    with pytest.raises(anybatch.UsageError, match="There is no run"):
        adapter.on_step_end(trainer.args, trainer.state, trainer.control)
    trainer.args._n_gpu = 2
    with pytest.raises(anybatch.UnsupportedError, match="torchrun"):
        adapter.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.args._n_gpu = 1
    sharded, averaged = made(ema_decay=0.9)
    sharded.model.net[0].weight.device_mesh = "as a DTensor has it"
    with pytest.raises(anybatch.UnsupportedError, match="sharded"):
        averaged.on_train_begin(sharded.args, sharded.state, sharded.control)
    trainer.train()
    with pytest.raises(anybatch.UsageError, match="holds no tensor"):
        trainer.training_step(trainer.model, ["a prompt"])


def test_sequences_without_padding_are_counted_one_by_one():
    examples = _sequences.examples

    ids = torch.arange(7)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    assert examples({"input_ids": ids, "position_ids": positions}) == 3
    assert examples({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 3, 5, 7])}) == 3
    assert examples({"input_ids": torch.zeros(5, 7), "position_ids": torch.zeros(5, 7)}) == 5


@pytest.mark.parametrize("scaled", [None, True, False])
def test_tokens_are_weights_unless_the_trainer_says_that_each_loss_is_a_mean(scaled, tmp_path, monkeypatch):
    trainer = workers.gpt_trainer(f"{tmp_path}", gpt.model(size=16), gpt.sentences(160, seed=3), max_steps=4)
    trainer.loss_is_scaled_for_ga = scaled
    adapter, weighed = attach(trainer, base_batch=4), []
    monkeypatch.setattr(_sequences, "tokens", lambda batches, **_: weighed.extend(batches) or [1] * len(batches))
    trainer.train()
    assert len(weighed) == (0 if scaled is False else 4 * adapter.controller.steps)


class Ignores(torch.nn.Module):
    """Accepts `num_items_in_batch`, as all models of transformers do, and returns the mean of its micro-batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(6, 1).double()

    def forward(self, x, labels, **kwargs):
        return {"loss": (self.net(x) - labels).square().mean()}


class Divides(Ignores):
    """A sum divided by the number, where it is given."""

    def forward(self, x, labels, num_items_in_batch=None, **kwargs):
        errors = (self.net(x) - labels).square()
        return {"loss": errors.mean() if num_items_in_batch is None else errors.sum() / num_items_in_batch}


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("model", [Ignores, Divides])
def test_the_gradient_is_the_mean_whatever_the_model_does_with_the_number_of_items(model, micro_batches, made):
    """One step of SGD at a fixed rate moves the weights by the mean gradient of a plain loop, at any accumulation."""
    data = [{"x": x, "labels": x.sum(-1, keepdim=True)} for x in task.examples()[: 4 * task.SIZE][0]]
    net = model()
    plain = Ignores()
    x = torch.stack([each["x"] for each in data[: micro_batches * task.SIZE]])
    plain(x, x.sum(-1, keepdim=True))["loss"].backward()
    expected = [p.detach() - 0.1 * p.grad for p in plain.parameters()]
    trainer, _ = made(
        net,
        base_batch=micro_batches * task.SIZE,
        rule="Identity",
        data=data,
        max_steps=1,
        optimizer=False,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        gradient_accumulation_steps=micro_batches,
        label_names=["labels"],
    )
    assert trainer.model_accepts_loss_kwargs
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    ours = [str(each.message) for each in seen if issubclass(each.category, anybatch.AnybatchWarning)]
    told = [each for each in ours if "trainer.model_accepts_loss_kwargs = False" in each]
    assert len(told) == (model is Ignores and micro_batches > 1)
    for p, value in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rule", "steps"), [("Identity", 8), ("SquareRoot", 2), ("Linear", 2)])
def test_rules_that_measure_nothing_take_a_loss_over_tokens_too(rule, steps, tmp_path):
    trainer = workers.gpt_trainer(f"{tmp_path}", gpt.model(size=16), gpt.sentences(160, seed=3), max_steps=8)
    adapter = attach(trainer, base_batch=4, rule=rule)
    trainer.train()
    assert adapter.controller.steps == steps
    assert adapter.controller.scale == 4


def test_arguments_are_parsed_and_given_on(made, tmp_path):
    parser = HfArgumentParser(AnyBatchArguments)
    path = f"{tmp_path}/run.jsonl"
    (parsed,) = parser.parse_args_into_dataclasses(["--base_batch", "4", "--rule", "Linear", "--record", path])
    assert parsed == AnyBatchArguments(base_batch=4, rule="Linear", ema_decay=None, record=path)
    trainer, adapter = made(**vars(parsed))
    trainer.train()
    assert adapter.controller.rule == anybatch.Linear()
    assert [step.scale for step in anybatch.read_record(path).steps] == [4.0] * 5
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([])
    (parsed,) = parser.parse_args_into_dataclasses(["--base_batch", "4", "--record", path, "--per_layer", "2"])
    trainer, adapter = made(**vars(parsed))
    trainer.train()
    looked = [bool(step.per_layer) for step in anybatch.read_record(path).steps]
    assert looked == [i % 2 == 0 for i in range(adapter.controller.steps)]
    assert len(looked) > 2


def test_the_example_runs(tmp_path):
    names = {"torch": torch, "tmp_path": tmp_path}
    ran = doctest.testmod(adapter_module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert ran.attempted > 5
    assert ran.failed == 0
