"""transformer: Transformer base on WMT 2014 English to German, as in Table 2 of AdaScale SGD; the metric is BLEU.

The paper gives the base batch, the iterations, momentum .99 and a step decay. Its learning rate and the steps are not
published: those here are a start for tuning at scale 1. BLEU is sacrebleu's, of plain text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

import anybatch
from recipes.training.buckets import bucketed, cut
from recipes.training.sharing import ALONE, Share
from recipes.training.task import Task
from recipes.translation import made
from recipes.translation.model import BEGIN, LENGTH_PENALTY, PAD, TransformerModel, translate
from recipes.translation.wmt import ParallelText, read_pairs, train_pairs, vocabulary_of

SMOOTHING = 0.1
STEPS = (0.5, 0.75, 0.9)  # of the run, where the learning rate is divided by STEP
STEP = 3.0


class Transformer(Task):
    """Batches are counted in target tokens, the end of a sentence included and padding not.

    Args:
        data: the folder with the text, see `wmt`.
        tiny: 2 + 2 layers of width 64, and a vocabulary of 300.
        optimizer: `"sgd"`, the paper's, or `"adamw"`.
        test: the name of the files to test on.
        beam: targets kept by beam search.
    """

    name = "transformer"
    metric = "BLEU"
    one_size = lockstep = False  # a translation calls the model once for each of its tokens
    examples = None  # the base batch is in tokens, and batches are of sentences of one length

    def __init__(
        self,
        data: Path | None,
        *,
        tiny: bool = False,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        test: str = "newstest2014",
        beam: int = 4,
    ) -> None:
        from sacrebleu.metrics.bleu import BLEU

        super().__init__(data, tiny=tiny)
        if optimizer not in ("sgd", "adamw"):
            raise anybatch.InvalidValueError(f'optimizer must be "sgd" or "adamw", got {optimizer!r}.')
        self.base_batch, self.total = (256, 1000) if tiny else (2048, 1_550_000)
        self.learning_rate = {"sgd": 0.2 if tiny else 0.02, "adamw": 2e-3 if tiny else 2e-4}[optimizer]
        self.optimizer_name, self.beam = optimizer, beam
        self.variant = {"optimizer": optimizer}
        size = 300 if tiny else 37_000
        self.vocabulary = vocabulary_of(data, size=size)
        self.train_set: ParallelText = train_pairs(data, vocabulary=self.vocabulary, size=size)
        self.test_pairs = list(read_pairs(data, test))
        signature = BLEU(references=[[target for _, target in self.test_pairs]]).get_signature()
        self.measured = f"sacrebleu {signature}, {test}, beam {beam}, length penalty {LENGTH_PENALTY}"

    def model(self) -> nn.Module:
        """Transformer base; tiny has no dropout."""
        size = self.vocabulary.get_piece_size()
        if self.tiny:
            return TransformerModel(size, width=64, heads=4, inner=256, layers=2, dropout=0.0)
        return TransformerModel(size)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """SGD with momentum .99, the paper's, or AdamW with betas .9 and .98.

        Tiny has momentum .9, as a memory of 100 steps is most of what it takes at a large scale.
        """
        if self.optimizer_name == "sgd":
            momentum = 0.9 if self.tiny else 0.99
            return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=momentum)
        return torch.optim.AdamW(model.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), eps=1e-9)

    def scheduler(self, optimizer: Optimizer) -> Any:
        """Step decay."""
        milestones = [round(part * self.total) for part in STEPS]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=1 / STEP)

    def collate(self, examples: list[Any]) -> tuple[Tensor, Tensor]:
        """Sources `[B, m]` and targets `[B, n + 1]`, which begin with BEGIN; padded with PAD."""
        sources, targets = zip(*examples, strict=True)
        begin = torch.tensor([BEGIN])
        return (
            pad_sequence(list(sources), batch_first=True, padding_value=PAD),
            pad_sequence([torch.cat((begin, x)) for x in targets], batch_first=True, padding_value=PAD),
        )

    def size(self, batch: Any) -> int:
        """Target tokens."""
        return int((batch[1][:, 1:] != PAD).sum())

    def batches(
        self, micro_batch: int, *, seed: int, rank: int, ranks: int, start: int = 0, workers: int = 0
    ) -> Iterator[Any]:
        """Pairs of like length together, about `micro_batch` target tokens each time, see `buckets.Bucketed`."""
        sources, targets = self.train_set.source.lengths(), self.train_set.target.lengths()
        lengths = [max(pair) for pair in zip(sources, targets, strict=True)]
        place = {"seed": seed, "rank": rank, "ranks": ranks, "start": start}
        return bucketed(self, targets, lengths=lengths, micro_batch=micro_batch, workers=workers, **place)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean over the target tokens, with label smoothing."""
        return _loss(model, batch, smoothing=SMOOTHING, reduction="mean")

    def evaluate(self, model: nn.Module, device: torch.device, share: Share = ALONE) -> dict[str, float]:
        """BLEU of the translated test set, and its mean loss per token without label smoothing."""
        from sacrebleu.metrics.bleu import BLEU

        test = ParallelText(iter(self.test_pairs), vocabulary=self.vocabulary, longest=None)
        lengths = test.source.lengths()
        order = sorted(range(len(test)), key=lengths.__getitem__)
        texts: list[tuple[int, str]] = []
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens
        with torch.no_grad():
            for part, counts in share.of(cut(order, lengths, parts=max(1, sum(lengths) // self.base_batch))):
                if not counts:
                    continue
                batch = tuple(x.to(device) for x in self.collate([test[i] for i in part]))
                sums[0] += _loss(model, batch, smoothing=0.0, reduction="sum")
                sums[1] += self.size(batch)
                found = translate(model, batch[0], beam=self.beam)
                texts += list(zip(part, self.vocabulary.decode(found), strict=True))
        loss, tokens = share.summed(sums).tolist()
        score = BLEU().corpus_score(share.gathered(texts), [[target for _, target in self.test_pairs]]).score
        return {self.metric: score, "loss": loss / tokens}


def _loss(model: nn.Module, batch: Any, *, smoothing: float, reduction: str) -> Tensor:
    source, target = batch
    logits = model(source, target[:, :-1])[0].flatten(0, 1).float()
    wanted = target[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, wanted, ignore_index=PAD, label_smoothing=smoothing, reduction=reduction)


def make(folder: Path, *, size: str = "tiny", seed: int = 0) -> None:
    """Write made languages to `folder`, see `made`; sizes `"tiny"` and `"small"`."""
    made.write(folder, size=size, seed=seed)
