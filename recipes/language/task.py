"""language: a GPT on a plain text, or on a folder of tokens as nanoGPT and llm.c write them; all sizes are in tokens.

Base batch and learning rates are those of GPT-3's models of these sizes (Brown et al., 2020, Table 2.1: half a million
tokens; 6e-4 and 3e-4), betas .9 and .95, clipping at 1 and weight decay .1 are its Appendix B's. Ours: the length,
10 billion tokens, the warm-up over 4 % of it, and the schedules' ends.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import anybatch
from recipes.language import made
from recipes.language.model import GPT, GPT2_TOKENS, SHAPES
from recipes.language.text import tokenized
from recipes.language.tokens import Windows, read_folder
from recipes.training.loading import loader
from recipes.training.sharing import ALONE, Share
from recipes.training.task import DataError, Shuffled, Task

WARMUP, FALL = 0.04, 0.2  # of the run, at its beginning and (WSD) at its end
LAST = 0.1  # of the rate is left at the end of a cosine
VALIDATION = 2**20  # tokens of an evaluation at most, evenly spread
TOGETHER = 2**13  # of them at a time: their logits are 1.6 GB
ROWS = 128  # the vocabulary is filled up to a multiple: matrices of odd sizes are slow on GPUs
RATES = {"tiny": 2e-3, "124M": 6e-4, "350M": 3e-4}
CHOICES = {"size": ("124M", "350M"), "optimizer": ("adamw", "muon"), "schedule": ("cosine", "wsd")}
make = made.make


class Language(Task):
    """The next token of a text.

    Args:
        data: a text file; a folder with one .txt; or a folder of .bin files, see `tokens`.
        tiny: two layers of width 64, 64 tokens seen, a vocabulary of 512.
        size: `"124M"` or `"350M"`, GPT-2's.
        optimizer: `"adamw"`, or `"muon"` for the matrices of the blocks and AdamW for all else.
        schedule: after a warm-up `"cosine"` to a tenth, or `"wsd"`: constant, and to zero over the last fifth.
        vocabulary: tokens made of a text (512 or 50,257), or those of the .bin files' own tokenizer (GPT-2's 50,257).
    """

    name = "language"
    metric = "accuracy"  # of the next token, in percent
    clip = 1.0

    def __init__(
        self,
        data: Path | None,
        *,
        tiny: bool = False,
        size: str = "124M",
        optimizer: Literal["adamw", "muon"] = "adamw",
        schedule: Literal["cosine", "wsd"] = "cosine",
        vocabulary: int | None = None,
    ) -> None:
        super().__init__(data, tiny=tiny)
        for name, value in (("size", size), ("optimizer", optimizer), ("schedule", schedule)):
            if value not in CHOICES[name]:
                raise anybatch.InvalidValueError(f"--{name} is {' or '.join(CHOICES[name])}, got {value!r}.")
        self.size_name = "tiny" if tiny else size
        self.shape, self.learning_rate = SHAPES[self.size_name], RATES[self.size_name]
        self.optimizer_name, self.schedule = optimizer, schedule
        self.base_batch, self.total = (512, 1000) if tiny else (2**19, 19_073)
        folder, self.vocabulary = _tokens(data, vocabulary=vocabulary or (512 if tiny else GPT2_TOKENS))
        sets = (read_folder(folder, kind) for kind in ("train", "val"))
        known = {"context": self.shape.context, "vocabulary": self.vocabulary}
        self.train_set: Windows
        self.train_set, self.test_set = (Windows(shards, **known) for shards in sets)
        self.variant = {
            "size": self.size_name,
            "optimizer": optimizer,
            "schedule": schedule,
            "vocabulary": self.vocabulary,
            "tokens": self.examples,
        }

    @property
    def examples(self) -> int:
        """Tokens of an epoch."""
        return len(self.train_set) * self.shape.context

    def model(self) -> nn.Module:
        """The GPT."""
        return GPT(math.ceil(self.vocabulary / ROWS) * ROWS, self.shape)

    def optimizer(self, model: nn.Module) -> Optimizer | list[Optimizer]:
        """Matrices decay, biases and norms do not. Muon's rate is made to move matrices as far as AdamW's would."""
        blocks = model.get_submodule("blocks")
        inner = {p for p in blocks.parameters() if p.dim() == 2} if self.optimizer_name == "muon" else set()
        rest = [p for p in model.parameters() if p not in inner]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        adamw = AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        if not inner:
            return adamw
        ordered = [p for p in blocks.parameters() if p in inner]
        muon = Muon(ordered, lr=self.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        return [muon, adamw]

    def scheduler(self, optimizer: Optimizer) -> Any:
        """A warm-up and what was chosen, in base iterations."""
        return LambdaLR(optimizer, self.rate)

    def rate(self, iteration: int) -> float:
        """The learning rate at a base iteration, as a share of the highest."""
        warmup = WARMUP * self.total
        if iteration < warmup:
            return (iteration + 1) / (warmup + 1)
        if self.schedule == "wsd":
            return min(1.0, max(0.0, (self.total - iteration) / (FALL * self.total)))
        share = min(1.0, (iteration - warmup) / (self.total - warmup))
        return LAST + (1 - LAST) * (1 + math.cos(math.pi * share)) / 2

    def size(self, batch: Any) -> int:
        """Tokens that are predicted."""
        return len(batch) * self.shape.context

    def batches(
        self, micro_batch: int, *, seed: int, rank: int, ranks: int, start: int = 0, workers: int = 0
    ) -> Iterator[Any]:
        """Windows in an order of each epoch; a micro-batch is whole windows."""
        windows, rest = divmod(micro_batch, self.shape.context)
        if rest or not windows:
            raise anybatch.InvalidValueError(
                f"--micro-batch is in tokens, a multiple of the {self.shape.context} that are seen at once; got "
                f"{micro_batch}."
            )
        place = {"seed": seed, "rank": rank, "ranks": ranks, "start": start // self.shape.context}
        order = Shuffled(self.train_set, windows, **place)
        return iter(loader(self.train_set, order, workers=workers))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean over the tokens."""
        return cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device: torch.device, share: Share = ALONE) -> dict[str, float]:
        """The share of tokens that were the most likely one, the loss of a token in nats, and its exponential."""
        context, total = self.shape.context, len(self.test_set)
        number = min(total, max(1, VALIDATION // context))
        chosen = [i * total // number for i in range(number)]
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # right, loss
        at_once = max(1, TOGETHER // context)
        for some, counts in share.of([chosen[i : i + at_once] for i in range(0, number, at_once)]):
            batch = torch.stack([self.test_set[i] for i in some]).to(device)
            logits, wanted = model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten()
            right, loss = (logits.argmax(1) == wanted).sum(), cross_entropy(logits, wanted, reduction="sum")
            if counts:
                sums += torch.stack([right.double(), loss.double()])
        answers, losses = share.summed(sums).tolist()
        mean = losses / (number * context)
        perplexity = math.exp(mean) if mean < 100 else math.inf
        return {self.metric: 100 * answers / (number * context), "loss": mean, "perplexity": perplexity}


def _tokens(data: Path | None, *, vocabulary: int) -> tuple[Path, int]:
    """The folder with the tokens, and the size of the vocabulary."""
    if data is None:
        raise DataError("language needs --data: a text file, or a folder of tokens (*train*.bin and *val*.bin).")
    if data.is_dir() and any(data.glob("*.bin")):
        return data, vocabulary
    texts = sorted(data.glob("*.txt")) if data.is_dir() else [data]
    if len(texts) != 1:
        raise DataError(f"{data} has no .bin files, and {len(texts)} .txt files where one is needed.")
    return tokenized(texts[0], vocabulary=vocabulary)
