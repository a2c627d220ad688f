"""What a micro-batch of the Trainer's holds: examples, and tokens that its loss is a mean over."""

from typing import Any

from transformers.trainer_pt_utils import find_batch_size

import anybatch


def tokens(inputs: Any, *, shifted: bool) -> int:
    """How many labels a micro-batch has that count, which waits for the device.

    Args:
        inputs: the micro-batch, with labels.
        shifted: whether the loss leaves out the first label of each sequence.
    """
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"]
    if shifted and "shift_labels" not in inputs:
        labels = labels[..., 1:]
    return int((labels != -100).sum())


def examples(inputs: Any) -> int:
    """How many examples a micro-batch has.

    Raises:
        UsageError: that cannot be told.
    """
    if "cu_seq_lens_q" in inputs:  # sequences without padding, one after the other
        return len(inputs["cu_seq_lens_q"]) - 1
    rows: int | None = find_batch_size(inputs)
    if rows == 1 and "position_ids" in inputs:
        return int((inputs["position_ids"] == 0).sum())
    if rows is None:
        raise anybatch.UsageError(
            f"A micro-batch of type {type(inputs).__name__} holds no tensor, so the number of its examples is not "
            "known: this trainer makes its batches inside of training_step, and needs anybatch.attach by hand."
        )
    return rows
