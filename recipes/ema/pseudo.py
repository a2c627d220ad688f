"""Pseudo-labelling with an EMA teacher at any batch size.

    python -m recipes.ema.pseudo [--out docs/figures]                    the digits, 134 of 1347 labelled
    python -m recipes.ema.pseudo --config adamw [--out docs/figures]     the same with AdamW, or `adam`
    python -m recipes.ema.pseudo --config full --data DIR --device cuda  speech with CTC, Deep Speech 2
    python -m recipes.ema.pseudo --config transformer --data DIR ...     the same, a Transformer encoder with AdamW

The student learns from the labelled examples, and from unlabelled ones what its own EMA says of them before noise is
added. A teacher whose memory is kappa times too long labels with weights of long ago: what is wrong is not an average
at the end but the training itself.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from anybatch._demo import digits
from recipes.ema import runs
from recipes.ema.config import Config
from recipes.ema.plots import accuracy
from recipes.ema.runs import Results, Study
from recipes.ema.speech import Speech
from recipes.ema.train import Batch, Experiment

CONFIGS = {
    "small": Config(base_batch=16, total=1536, decay=0.98, rate=0.03),
    "adam": Config(base_batch=16, total=1536, decay=0.99, rate=1e-3, optimizer="adam", scales=(1, 8)),
    "adamw": Config(
        base_batch=16, total=1536, decay=0.99, rate=1e-3, optimizer="adamw", weight_decay=0.1, scales=(1, 8)
    ),
    # The learning rates are starts for tuning at the base batch.
    "full": Config(
        base_batch=32, total=84_800, decay=0.999, rate=3e-4, momentum=0.9, largest=64, evaluations=40, points=40,
        scales=(0.5, 1, 8, 16), seeds=3,
    ),
    "transformer": Config(
        base_batch=32, total=84_800, decay=0.999, rate=3e-4, optimizer="adamw", weight_decay=0.01, warmup=4000,
        cosine=True, largest=32, evaluations=40, points=40, scales=(0.5, 1, 8, 16), seeds=3,
    ),
}  # fmt: skip


class Digits(Experiment[nn.Module]):
    """The demo's network on the digits; a batch of n has n labelled and 3 n unlabelled images.

    Args:
        labelled: how many training images keep their label.
        noise: standard deviation of what is added to the student's pixels, in standard deviations of the pixels.
    """

    teaches = True
    labelled, noise, unlabelled_for_each = 134, 0.7, 3

    def model(self) -> nn.Module:
        """64-128-128-10."""
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """Noisy labelled images, their labels, unlabelled images, the same with noise."""
        x, y, _, _ = digits()
        known = torch.randint(self.labelled, (examples,), generator=generator)
        clean = x[torch.randint(self.labelled, len(x), (examples * self.unlabelled_for_each,), generator=generator)]
        return self._noisy(x[known], generator), y[known], clean, self._noisy(clean, generator)

    def targets(self, model: nn.Module, batch: Batch) -> Batch:
        """The teacher's most likely class in the place of the clean image."""
        x, y, clean, noisy = batch
        return x, y, model(clean).argmax(1), noisy

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the labelled plus that of the unlabelled, equally weighted."""
        x, y, pseudo, noisy = batch
        known, guessed = model(torch.cat([x, noisy])).split([len(x), len(noisy)])
        return cross_entropy(known, y) + cross_entropy(guessed, pseudo)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """On the 450 test images."""
        _, _, x, y = digits()
        logits = model(x)
        return {
            "accuracy": 100 * (logits.argmax(1) == y).double().mean().item(),
            "loss": cross_entropy(logits, y).item(),
        }

    def _noisy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x + self.noise * torch.randn(x.shape, generator=generator)


def make(config: Config, options: argparse.Namespace) -> Experiment[nn.Module]:
    """The experiment that `--config` names."""
    if options.config in ("small", "adam", "adamw"):
        return Digits(config)
    return Speech(config, data=options.data, transformer=options.config == "transformer", device=options.device)


def draw(results: Results, path: Path) -> None:
    """The student's accuracy."""
    accuracy(results, path, what="test accuracy of the student")


STUDY = Study(
    name="pseudo",
    description=__doc__,
    make=make,
    configs=CONFIGS,
    scales={"rule": None, "off": None, "adascale": None},
    metric="student_accuracy",
    draw=draw,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    runs.main(STUDY, arguments)


if __name__ == "__main__":
    main()
