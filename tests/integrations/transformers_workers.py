"""Training by the Trainer, on one process or several. In a module of its own, so that processes can import it."""

import contextlib

import oracle
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainerCallback, TrainingArguments

import anybatch
from anybatch.integrations.transformers import attach
from integrations import gpt, task
from integrations.accelerate_workers import shard, whole

QUIET = {
    "use_cpu": True,
    "max_steps": task.TOTAL,
    "per_device_train_batch_size": task.SIZE,
    "gradient_accumulation_steps": task.MICRO_BATCHES,
    "lr_scheduler_type": "cosine",
    "learning_rate": oracle.LR,
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


class Model(torch.nn.Module):
    """The oracle's task, as the Trainer wants it."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.net = oracle.make_model().to(dtype)

    def forward(self, x, y):
        return {"loss": oracle.loss_fn(self.net(x), y)}


class Tracing(TrainerCallback):
    """Notes gains and clock, and can stop a run as a kill would: after its checkpoint."""

    def __init__(self, adapter, *, kill=None):
        self.adapter, self.kill = adapter, kill

    def on_train_begin(self, *_, **__):
        self.trace = task.Trace(self.adapter.controller)
        self.first = self.adapter.controller.tau

    def on_step_end(self, args, state, control, **_):
        if self.kill == state.global_step:
            control.should_save = True

    def on_save(self, args, state, control, **_):
        if self.kill == state.global_step:
            raise Killed


class Killed(Exception):
    pass


def examples(data=None):
    return [{"x": x, "y": y} for x, y in data or task.examples()]


def trainer_of(folder, model=None, *, optimizer=True, data=None, **options):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    model = Model() if model is None else model
    callbacks, eval_dataset = options.pop("callbacks", None), options.pop("eval_dataset", None)
    return Trainer(
        model,
        TrainingArguments(folder, **{**QUIET, **options}),
        train_dataset=examples() if data is None else data,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        optimizers=(task.optimizer_of(model) if optimizer else None, None),
    )


def train(rank, world, folder, *, accumulation=None, kill=None, resume=None, scaler=None, sharded=False, **options):
    """Until the run is over, or killed after so many steps."""
    task.as_launched(rank, world)
    accumulation = accumulation or task.MICRO_BATCHES // world
    trainer = trainer_of(folder, gradient_accumulation_steps=accumulation, **options)
    trainer.accelerator.scaler = scaler  # as mixed precision has it on a device
    if sharded:
        shard(trainer.accelerator)
        trainer.is_fsdp_enabled = True
    adapter = attach(trainer, base_batch=task.SIZE)
    tracing = Tracing(adapter, kill=kill)
    trainer.add_callback(tracing)
    with contextlib.suppress(Killed):
        trainer.train(resume_from_checkpoint=resume)
    bare = trainer.optimizer.optimizer
    return {
        **task.outcome(tracing.trace, trainer.model, bare),
        "first": tracing.first,
        "steps": adapter.controller.steps,
        "log": trainer.state.log_history,
    }


def all_of(rank, world, folder, checkpoint):
    """Everything that two processes are asked."""
    shards = f"{folder}/shards"
    return {
        "parity": train(rank, world, folder),
        "clipped": train(rank, world, folder, max_grad_norm=0.5),
        "resumed": train(rank, world, folder, accumulation=2, resume=checkpoint),
        "gpt": gpt_parity(rank, world, folder),
        "sharded": whole(train(rank, world, folder, sharded=True)),
        "sharded, killed": train(rank, world, shards, accumulation=1, sharded=True, kill=task.KILLED),
        "sharded, resumed": whole(
            train(rank, world, shards, accumulation=2, sharded=True, resume=f"{shards}/checkpoint-{task.KILLED}")
        ),
    }


def gpt_trainer(folder, net, data, *, optimizer=None, **options):
    return Trainer(
        net,
        TrainingArguments(folder, **{**QUIET, "per_device_train_batch_size": task.SIZE, **options}),
        train_dataset=data,
        data_collator=gpt.collate,
        optimizers=(optimizer, None),
    )


def gpt_parity(rank, world, folder):
    """Gains and weights of a loss over all tokens of a step of four micro-batches, and what a plain loop has."""
    task.as_launched(rank, world)
    data = gpt.sentences(240, seed=3)
    net = gpt.model(dtype=torch.float64, size=16)
    optimizer = task.optimizer_of(net)
    options = {"max_steps": 20, "gradient_accumulation_steps": 4 // world}
    trainer = gpt_trainer(folder, net, data, optimizer=optimizer, **options)
    adapter = attach(trainer, base_batch=task.SIZE)
    tracing = Tracing(adapter)
    trainer.add_callback(tracing)
    trainer.train()
    return task.outcome(tracing.trace, net, optimizer)


def gpt_plain():
    """The same by hand: each loss a sum over its tokens, divided by those of the step, and its tokens for a weight."""
    data = gpt.sentences(240, seed=3)
    net = gpt.model(dtype=torch.float64, size=16)
    optimizer = task.optimizer_of(net)
    schedule = task.scheduler_of(optimizer, 20)
    options = {"base_batch": task.SIZE, "micro_batch": task.SIZE, "examples": len(data)}
    controller = anybatch.attach(optimizer, model=net, scheduler=schedule, total=20, **options)
    trace = task.Trace(controller)
    batches = [gpt.collate(data[i : i + task.SIZE]) for i in range(0, len(data), task.SIZE)]
    for first in range(0, len(batches), 4):
        micro_batches = batches[first : first + 4]
        tokens = [int((each["labels"][:, 1:] != -100).sum()) for each in micro_batches]
        for each, own in zip(micro_batches, tokens, strict=True):
            controller.weight = own
            (gpt.tokens_lost(net, each)[0] / sum(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller.done:
            break
    return task.outcome(trace, net, optimizer)
