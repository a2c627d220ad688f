"""A small GPT in the Trainer of transformers at three batch sizes, on paragraphs of unequal lengths.

    python -m benchmarks.trainer_gpt --json docs/frameworks/gpt.json

trains what is not there yet, in about twelve minutes of a shared core, and prints the table of docs/frameworks.md.

The text is Python's help on its own topics, in bytes. An example is a paragraph, cut at 128; the lengths scatter by
half of their mean. As the Trainer has it, a step's loss is the mean over all tokens of its micro-batches, padding left
out. All else is a script for batches of 4 paragraphs: AdamW, clipping at 1, a tenth of warm-up, a cosine. A scale is so
many micro-batches of 4 a step, and nothing else is changed. The rate is the best of `RATES` at scale 1, with a seed
that is not in the table. A run's loss is that of a token of the paragraphs held out; Welch's test over the seeds
compares a scale with scale 1.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, stdev
from time import perf_counter

import torch
from scipy.stats import ttest_ind
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments

from anybatch.integrations.transformers import attach
from benchmarks.kept import Kept, Row

BASE, LONGEST, TOTAL = 4, 128, 600
SCALES, RATES, SEEDS, TUNING = (1, 8, 32), (2.5e-3, 5e-3, 1e-2), 4, 100
HELD_OUT = 10  # one paragraph of so many
Batch = dict[str, Tensor]


def paragraphs() -> tuple[list[Tensor], list[Tensor]]:
    """Those to train on, and those held out, spread over the text."""
    text = (part.strip().encode("ascii", "replace") for name in sorted(topics) for part in topics[name].split("\n\n"))
    found = [torch.tensor(list(each[:LONGEST])) for each in text if len(each) >= 8]
    return [each for i, each in enumerate(found) if i % HELD_OUT], found[::HELD_OUT]


def collate(examples: Sequence[Tensor]) -> Batch:
    """Padded to the longest; what is padding is no label."""
    words = pad_sequence(list(examples), batch_first=True)
    mask = torch.arange(words.shape[1]) < torch.tensor([len(each) for each in examples])[:, None]
    return {"input_ids": words, "attention_mask": mask.long(), "labels": words.where(mask, -100)}


@torch.no_grad()
def loss_of(net: torch.nn.Module, examples: Sequence[Tensor]) -> float:
    """The mean cross entropy of a token."""
    lost, tokens = 0.0, 0
    net.eval()
    for first in range(0, len(examples), 32):
        batch = collate(examples[first : first + 32])
        logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        lost += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
        tokens += int((labels != -100).sum())
    return lost / tokens


def train(scale: int, *, rate: float, seed: int, total: int = TOTAL, size: int = 64) -> Row:
    """One run; its steps, its loss and how long it took."""
    data, held_out = paragraphs()
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=128,
        max_position_embeddings=LONGEST,
        hidden_size=size,
        intermediate_size=4 * size,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    net = GPTNeoXForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            seed=seed,
            max_steps=total,
            per_device_train_batch_size=BASE,
            gradient_accumulation_steps=scale,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.1,
            max_grad_norm=1.0,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(net, arguments, train_dataset=data, data_collator=collate)
        adapter, began = attach(trainer, base_batch=BASE), perf_counter()
        trainer.train()
    controller, seconds = adapter.controller, perf_counter() - began
    assert controller is not None
    return {
        "scale": scale, "rate": rate, "seed": seed, "loss": loss_of(net, held_out), "steps": controller.steps,
        "tau": controller.tau, "seconds": seconds,
    }  # fmt: skip


class Results(Kept):
    """Runs, kept in a file as they end.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, {"base_batch": BASE, "total": TOTAL}, apart="another batch or length")

    def of(self, scale: int, *, rate: float, seed: int) -> Row:
        """That run, trained now where it was not yet."""
        row = self.find({"scale": scale, "rate": rate, "seed": seed})
        if row is None:
            self.keep(row := train(scale, rate=rate, seed=seed))
        return row


def table(results: Results) -> list[str]:
    """The page's lines."""
    rate = min(RATES, key=lambda each: float(results.of(1, rate=each, seed=TUNING)["loss"]))
    rows = {scale: [results.of(scale, rate=rate, seed=seed) for seed in range(SEEDS)] for scale in SCALES}
    lines = ["| scale | batch | loss a token | p (Welch) | steps | paragraphs seen |", "|---" * 6 + "|"]
    base = [row["loss"] for row in rows[1]]
    for scale, runs in rows.items():
        losses, steps = [row["loss"] for row in runs], fmean(row["steps"] for row in runs)
        p = "" if scale == 1 else f"{ttest_ind(losses, base, equal_var=False).pvalue:.2f}"
        seen = f"{steps * scale * BASE:,.0f}"
        loss = f"{fmean(losses):.3f} ± {stdev(losses):.3f}"
        lines.append(f"| {scale} | {scale * BASE} | {loss} | {p} | {steps:.0f} | {seen} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the runs, those to come and those that were")
    torch.set_num_threads(1)
    print("\n".join(table(Results(parser.parse_args().json))))


if __name__ == "__main__":
    main()
