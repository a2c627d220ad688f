"""Training by the Trainer, on one process or several. In a module of its own, so that processes can import it."""

import oracle
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainerCallback, TrainingArguments

from anybatch.integrations.transformers import attach
from integrations import task


class Model(torch.nn.Module):
    """The oracle's task, as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.net = oracle.make_model()

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


def examples():
    return [{"x": x, "y": y} for x, y in task.examples()]


def trainer_of(folder, model=None, *, optimizer=True, data=None, **options):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    model = Model() if model is None else model
    quiet = {
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
    callbacks, eval_dataset = options.pop("callbacks", None), options.pop("eval_dataset", None)
    return Trainer(
        model,
        TrainingArguments(folder, **{**quiet, **options}),
        train_dataset=examples() if data is None else data,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        optimizers=(task.optimizer_of(model) if optimizer else None, None),
    )


def train(rank, world, folder, *, accumulation=None, kill=None, resume=None, **options):
    """Until the run is over, or killed after so many steps."""
    task.as_launched(rank, world)
    trainer = trainer_of(folder, gradient_accumulation_steps=accumulation or task.MICRO_BATCHES // world, **options)
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
    return {
        "parity": train(rank, world, folder),
        "clipped": train(rank, world, folder, max_grad_norm=0.5),
        "resumed": train(rank, world, folder, accumulation=2, resume=checkpoint),
    }
