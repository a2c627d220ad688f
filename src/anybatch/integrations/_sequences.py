"""Sizes of the Trainer's micro-batches: examples, and the tokens that the loss is a mean over."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

import anybatch


def tokens(batches: Sequence[Any], *, shifted: bool) -> list[int]:
    """The number of labels in the loss of each micro-batch of a step, with one synchronisation for all of them.

    `shifted`: the loss omits the first label of each sequence.
    """
    found = []
    for each in batches:
        labels = each["shift_labels"] if "shift_labels" in each else each["labels"]
        if shifted and "shift_labels" not in each:
            labels = labels[..., 1:]
        found.append((labels != -100).sum())
    counts: list[int] = torch.stack(found).tolist()
    return counts


def divides_by_items(trainer: Trainer, inputs: Any, items: Any) -> bool:
    """Whether the loss of the trainer's model is a sum over `items`, divided by their number.

    Many models accept `num_items_in_batch` and return the mean of their micro-batch all the same. The Trainer does not
    divide such losses by the accumulation. Two forwards without gradients compare the losses of two numbers of items.
    """
    model, prepared = trainer.model_wrapped, trainer._prepare_inputs(inputs)
    losses, training = [], model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for number in (items, 2 * items):
                loss = trainer.compute_loss(model, dict(prepared), num_items_in_batch=number)
                losses.append(loss.item() if isinstance(loss, torch.Tensor) else loss[0].item())
    finally:
        model.train(training)
    # A loss of 0 shows nothing. A part of the loss, such as a router's, may not be divided.
    return not losses[0] == losses[1] != 0


def examples(inputs: Any) -> int:
    """The number of examples of a micro-batch."""
    if "cu_seq_lens_q" in inputs:  # concatenated sequences without padding
        return len(inputs["cu_seq_lens_q"]) - 1
    rows: int | None = find_batch_size(inputs)
    if rows == 1 and "position_ids" in inputs:
        return int((inputs["position_ids"] == 0).sum())
    if rows is None:
        raise anybatch.UsageError(
            f"A micro-batch of type {type(inputs).__name__} holds no tensor, so the number of its examples is "
            "unknown. This trainer makes its batches inside of training_step: call anybatch.attach yourself."
        )
    return rows
