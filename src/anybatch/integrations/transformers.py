"""anybatch in the Trainer of Hugging Face's transformers, and in TRL's trainers that derive from it."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers import Trainer

import anybatch
from anybatch.integrations._trainer import AnyBatchCallback

__all__ = ["AnyBatchArguments", "AnyBatchCallback", "attach"]

RuleName = Literal["AdaScale", "Linear", "SquareRoot", "Identity"]


@dataclass
class AnyBatchArguments:
    """The arguments of `attach` for `transformers.HfArgumentParser`.

    Args:
        base_batch: batch size that the hyperparameters were tuned for, over all processes, in examples; positive.
        rule: name of the scaling rule.
        ema_decay: decay of a model average per base iteration, in [0, 1); evaluations then use the average.
        record: path of the record, with a line for each step.
        per_layer: number of steps between measurements of each layer's noise, for `anybatch report`; positive.
    """

    base_batch: int = field(metadata={"help": "Batch size that the hyperparameters were tuned for, in examples."})
    rule: RuleName = field(default="AdaScale", metadata={"help": "How steps scale with the batch."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of a model average, per base iteration."})
    record: str | None = field(default=None, metadata={"help": "File that gets a line of JSON for each step."})
    per_layer: int | None = field(default=None, metadata={"help": "Record each layer's noise every so many steps."})


def attach(
    trainer: Trainer,
    base_batch: int,
    *,
    rule: anybatch.Rule | RuleName = "AdaScale",
    ema_decay: float | None = None,
    record: str | None = None,
    per_layer: int | None = None,
) -> AnyBatchCallback:
    """Train as at `base_batch`, with the trainer's batch, accumulation and number of processes.

    `max_steps`, epochs, warm-up and schedule are those of the base batch. A run is `max_steps` base iterations long, or
    `num_train_epochs * examples / base_batch`, and takes fewer steps. The intervals of logging, evaluation and saving
    count optimizer steps. The trainer's log and all reporters get `gain`, `scale`, `tau` and `noise_scale`.

    Args:
        trainer: a `transformers.Trainer`, or one of TRL's, before `train()`.
        base_batch: as in `AnyBatchArguments`, like the next four.
        rule: its name, or an `anybatch.Rule`.
        ema_decay: decay of the average.
        record: path of the record.
        per_layer: steps between measurements by layer.

    Returns:
        The added callback; its `controller` and `ema` belong to the current or the last run.

    Raises:
        InvalidValueError: a value out of range.
        UnsupportedError: at `train()`, FSDP1, several devices in one process, or some settings of DeepSpeed.
        UsageError: the trainer is already attached or in `train()`, or has both `ema_decay` and
            `load_best_model_at_end`; at `train()`, the first step has no gradient or calls no hook.
        StateError: at `train(resume_from_checkpoint=...)`, the checkpoint is from a run without anybatch.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from anybatch.integrations.transformers import attach
        >>> class Line(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.zeros(4))
        ...     def forward(self, x, y):
        ...         return {"loss": (x @ self.weight - y).square().mean()}
        >>> data = [{"x": x, "y": x.sum() + torch.randn(())} for x in torch.randn(200, 4)]
        >>> options = {"max_steps": 20, "gradient_accumulation_steps": 4, "disable_tqdm": True, "use_cpu": True}
        >>> arguments = TrainingArguments(str(tmp_path), dataloader_pin_memory=False, **options)
        >>> trainer = Trainer(Line(), arguments, train_dataset=data)
        >>> adapter = attach(trainer, base_batch=8)
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> adapter.controller.scale, 20 <= adapter.controller.tau < 24, result.global_step < 20
        (4.0, True, True)
    """
    if any(isinstance(each, AnyBatchCallback) for each in trainer.callback_handler.callbacks):
        raise anybatch.UsageError("This trainer has anybatch attached already: call attach once.")
    if trainer.is_in_train:
        raise anybatch.UsageError(
            "The trainer is in train(), or failed in it: attach before it, or make a new trainer."
        )
    if isinstance(rule, str) and rule not in get_args(RuleName):
        raise anybatch.InvalidValueError(f"rule must be one of {get_args(RuleName)} or an anybatch.Rule, got {rule!r}.")
    made: anybatch.Rule = getattr(anybatch, rule)() if isinstance(rule, str) else rule
    if ema_decay is not None and trainer.args.load_best_model_at_end:
        raise anybatch.UsageError(
            "With ema_decay evaluations use the average, but load_best_model_at_end would load the weights without the "
            "average: omit one of them."
        )
    callback = AnyBatchCallback(trainer, base_batch, rule=made, ema_decay=ema_decay, record=record, per_layer=per_layer)
    # Before the reporters, which log its numbers, and before the flow callback, which ends the run.
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
