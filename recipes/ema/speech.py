"""Pseudo-labelling's full configurations: Deep Speech 2 or a Transformer on LibriSpeech, a tenth of it transcribed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from recipes.ema.config import Config
from recipes.ema.encoder import SpeechTransformer
from recipes.ema.train import Batch, Experiment
from recipes.speech import task as speech
from recipes.speech.model import BLANK, CHARACTERS, greedy
from recipes.training.task import Shuffled


class Speech(Experiment[nn.Module]):
    """The recipe's data and network (recipes/speech/task.py), at a constant learning rate.

    A batch of n has n transcribed utterances and as many without. The teacher, in evaluation mode, hears one of these
    as it is, and its greedy transcript is the label; the student hears it with bands of time and of frequency set to
    zero. An utterance in which the teacher hears nothing has no loss.

    Args:
        config: see `Config`.
        data: the folder with LibriSpeech's `train-*` and `test-clean`.
        labelled: the share of utterances that keep their transcripts.
        transformer: a Transformer encoder in the place of Deep Speech 2.
        tiny: the recipe's small network.
        device: where the network is.
        workers: processes that load audio.
    """

    teaches = True

    def __init__(
        self, config: Config, *, data: Path | None, labelled: float = 0.1, transformer: bool = False,
        tiny: bool = False, device: str = "cpu", workers: int = 8,
    ) -> None:  # fmt: skip
        super().__init__(config, device=device)
        self.task, self.transformer, self.workers = speech.Speech(data, tiny=tiny), transformer, workers
        rows = torch.randperm(len(self.task.train_set), generator=torch.Generator().manual_seed(0)).tolist()
        known = max(1, round(labelled * len(rows)))
        self.parts = rows[:known], rows[known:]
        self._order: torch.Generator | None = None

    def model(self) -> nn.Module:
        """Deep Speech 2, or the Transformer encoder: 12 layers of 512, 39 million parameters."""
        if not self.transformer:
            return self.task.model()
        return SpeechTransformer(width=32, layers=2, heads=2, inner=64) if self.task.tiny else SpeechTransformer()

    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """Transcribed features, lengths, labels and their lengths; then untranscribed features and lengths."""
        if self._order is not generator:  # another run
            self._order = generator
            self._streams = [self._stream(rows, generator.initial_seed()) for rows in self.parts]
        known, unknown = ([next(stream) for _ in range(examples)] for stream in self._streams)
        features, lengths, labels, label_lengths = self.task.collate(known)
        heard, heard_lengths, _, _ = self.task.collate(unknown)
        parts = features, lengths, labels, label_lengths, heard, heard_lengths
        return tuple(tensor.to(self.device) for tensor in parts)

    def targets(self, model: nn.Module, batch: Batch) -> Batch:
        """With the teacher's transcripts of the untranscribed, which are masked then."""
        *known, heard, lengths = batch
        model.eval()
        texts = greedy(*model(heard, lengths))
        model.train()
        labels = [torch.tensor([CHARACTERS.index(c) + 1 for c in text], dtype=torch.long) for text in texts]
        sizes = torch.tensor([len(label) for label in labels])
        padded = pad_sequence(labels, batch_first=True)
        if padded.shape[1] == 0:  # the teacher hears nothing anywhere
            padded = torch.ones(len(labels), 1, dtype=torch.long)
        return *known, self._masked(heard), lengths, padded.to(heard.device), sizes.to(heard.device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """CTC on the transcribed plus CTC on what the teacher heard in the others, each a mean over its utterances."""
        known = self.task.loss(model, batch[:4])
        heard, lengths, labels, sizes = batch[4:]
        log_probs, steps = model(heard, lengths)
        pseudo = nn.functional.ctc_loss(
            log_probs, labels, steps, sizes, blank=BLANK, reduction="none", zero_infinity=True
        )
        return known + (pseudo * (sizes > 0)).mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Word accuracy on test-clean, and the loss."""
        found = self.task.evaluate(model, self.device)
        return {"accuracy": found[self.task.metric], "loss": found["loss"]}

    def _stream(self, rows: list[int], seed: int) -> Iterator[Any]:
        order = Shuffled(rows, self.config.base_batch, seed=seed, rank=0, ranks=1, start=self.start)
        chosen = ([rows[i] for i in chunk] for chunk in order)
        loader = DataLoader(self.task.train_set, batch_sampler=chosen, collate_fn=list, num_workers=self.workers)
        return (example for chunk in loader for example in chunk)

    def _masked(self, features: Tensor) -> Tensor:
        """Two bands of up to a twentieth of the time and two of up to a tenth of the frequencies at 0, in each."""
        features = features.clone()
        for axis, share in ((1, 0.05), (2, 0.1)):
            size = features.shape[axis]
            at = torch.arange(size, device=features.device)
            for _ in range(2):
                draws = torch.rand(2, len(features), 1, generator=self._order).to(features.device)
                start, width = draws[0] * size, draws[1] * share * size
                hidden = (at >= start) & (at < start + width)
                features.masked_fill_(hidden[:, :, None] if axis == 1 else hidden[:, None, :], 0.0)
        return features
