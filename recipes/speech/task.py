"""speech: Deep Speech 2 on LibriSpeech, as in Table 2 of AdaScale SGD; the metric is word accuracy, 100 % - WER.

The paper gives the base batch, the iterations and an exponential decay. Its learning rate is not published: the one
here is a start for tuning at scale 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from recipes.speech import made
from recipes.speech.librispeech import LibriSpeech, read_splits
from recipes.speech.model import BLANK, DeepSpeech2, edit_distance, greedy
from recipes.training.buckets import bucketed
from recipes.training.sharing import ALONE, Share
from recipes.training.task import Task

FINAL = 0.01  # of the learning rate is left at the end


class Speech(Task):
    """Every `train-*` folder of LibriSpeech that is there to train on, and `test-clean` to test on."""

    name = "speech"
    metric = "word accuracy"
    examples = None  # batches are of utterances of one length
    one_size = False
    clip = 400.0  # Deep Speech 2's (Amodei et al., 2016)

    def __init__(self, data: Path | None, *, tiny: bool = False) -> None:
        super().__init__(data, tiny=tiny)
        self.base_batch, self.total = (8, 600) if tiny else (32, 84_800)
        self.learning_rate = 3e-3 if tiny else 3e-4
        self.train_set: LibriSpeech = LibriSpeech(read_splits(data, "train-"), train=True)
        self.test_set = LibriSpeech(read_splits(data, "test-clean"), train=False)

    def model(self) -> nn.Module:
        """Deep Speech 2 with 41 million parameters; tiny has 2 recurrent layers of 64 units."""
        return DeepSpeech2(channels=4, hidden=64, layers=2) if self.tiny else DeepSpeech2()

    def optimizer(self, model: nn.Module) -> Optimizer:
        """SGD with momentum .9."""
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=0.9)

    def scheduler(self, optimizer: Optimizer) -> Any:
        """Exponential decay to a hundredth."""
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=FINAL ** (1 / self.total))

    def collate(self, examples: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features `[B, frames, bins]` and labels `[B, characters]`, each padded with zeros and with its lengths."""
        features, labels = zip(*examples, strict=True)
        lengths = [torch.tensor([len(x) for x in sequences]) for sequences in (features, labels)]
        padded = [pad_sequence(list(sequences), batch_first=True) for sequences in (features, labels)]
        return padded[0], lengths[0], padded[1], lengths[1]

    def batches(
        self, micro_batch: int, *, seed: int, rank: int, ranks: int, start: int = 0, workers: int = 0
    ) -> Iterator[Any]:
        """Utterances of like length together, see `buckets.Bucketed`."""
        lengths = [utterance.samples for utterance in self.train_set.utterances]
        place = {"seed": seed, "rank": rank, "ranks": ranks, "start": start}
        return bucketed(self, [1] * len(lengths), lengths=lengths, micro_batch=micro_batch, workers=workers, **place)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean over the utterances of their negative log-likelihoods."""
        features, lengths, labels, label_lengths = batch
        log_probs, steps = model(features, lengths)
        return _losses(log_probs, steps, labels, label_lengths).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device: torch.device, share: Share = ALONE) -> dict[str, float]:
        """Word accuracy by greedy decoding, and the mean loss of an utterance."""
        order = sorted(range(len(self.test_set)), key=lambda i: self.test_set.utterances[i].samples)
        parts = share.of([order[i : i + self.base_batch] for i in range(0, len(order), self.base_batch)])
        batches = self.tested(self.test_set, [part for part, _ in parts], collate=self.collate)
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # edits, words, loss
        for batch, (part, counts) in zip(batches, parts, strict=True):
            features, lengths, labels, label_lengths = (x.to(device, non_blocking=True) for x in batch)
            log_probs, steps = model(features, lengths)
            if not counts:
                continue
            sums[2] += _losses(log_probs, steps, labels, label_lengths).sum()
            for index, text in zip(part, greedy(log_probs, steps), strict=True):
                said = self.test_set.utterances[index].text.split()
                sums[:2] += torch.tensor([edit_distance(said, text.split()), len(said)], device=device)
        edits, words, loss = share.summed(sums).tolist()
        return {self.metric: 100 * (1 - edits / words), "loss": loss / len(order)}


def _losses(log_probs: Tensor, steps: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    return nn.functional.ctc_loss(log_probs, labels, steps, label_lengths, blank=BLANK, reduction="none")


def make(folder: Path, *, size: str = "tiny", seed: int = 0) -> None:
    """Write made speech to `folder`, see `made`; sizes `"tiny"` and `"small"`."""
    made.write(folder, size=size, seed=seed)
