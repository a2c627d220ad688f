"""BYOL, self-supervised learning from an EMA teacher, at any batch size.

    python -m recipes.ema.byol [--out docs/figures]                      the digits, a small perceptron
    python -m recipes.ema.byol --config full --data DIR --device cuda    ResNet-18 on an image folder, GroupNorm
    python -m recipes.ema.byol --config full-bn ...                      BatchNorm over micro-batches of 256
    python -m recipes.ema.byol --config full-lars ...                    GroupNorm, with LARS as BYOL's authors have it
    python -m recipes.ema.byol --config vit ...                          a vision transformer, with AdamW

Of each image two views are made. The student predicts from one what its own EMA, the teacher, makes of the other. No
label is used; what was learned is measured by a linear probe, a ridge regression from the features to the classes.
Full sizes go from a batch of 4,096 to 24,576, at once and progressively.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybatch._demo import digits
from recipes.ema import runs
from recipes.ema.config import Config
from recipes.ema.distillation import GROUP, Byol, Distillation, probe
from recipes.ema.images import Folder
from recipes.ema.plots import teacher_probe
from recipes.ema.runs import Study
from recipes.ema.train import Batch

EPOCH = 1_281_167 / 4096  # base iterations of ImageNet's
_FULL: dict[str, Any] = {
    "base_batch": 4096, "total": round(100 * EPOCH), "decay": 0.996, "largest": 256, "evaluations": 20, "points": 20,
    "scales": (1, 2, 6), "seeds": 1,
}  # fmt: skip
# LARS's are what BYOL's authors use for 100 epochs: 0.45 for 256 images, and a rho of .99; 0.2, .996 and a weight decay
# of 1.5e-6 are their paper's, for 1,000 epochs. The other full learning rates are starts for tuning.
CONFIGS = {
    "small": Config(base_batch=64, total=1024, decay=0.998, rate=0.1),
    "full": Config(rate=0.4, momentum=0.9, weight_decay=1e-6, **_FULL),
    "full-bn": Config(rate=0.4, momentum=0.9, weight_decay=1e-6, **_FULL),
    "full-lars": Config(
        rate=7.2, optimizer="lars", momentum=0.9, trust=1e-3, weight_decay=1e-6, warmup=round(10 * EPOCH), cosine=True,
        final_decay=1.0, **_FULL | {"decay": 0.99},
    ),
    "vit": Config(rate=4e-4, optimizer="adamw", weight_decay=0.1, warmup=round(10 * EPOCH), cosine=True, **_FULL),
}  # fmt: skip
NETWORKS = {"full": "resnet", "full-bn": "resnet-bn", "full-lars": "resnet", "vit": "vit"}
PROGRESSIVE = ((1, 2, 4, 8), (4, 8, 16, 32), (1, 6))  # the last from 4,096 to 24,576 at full size


class Digits(Distillation):
    """The digits with other brightness and much noise; 16 features.

    Args:
        noise: standard deviation of what is added to the pixels, in standard deviations of the pixels.
        labelled: how many training images the probe sees.
    """

    noise, labelled = 0.7, 1000

    def model(self) -> Byol:
        """64-128-16, heads 64 wide."""
        encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
        return Byol(encoder, 16, hidden=64, outputs=32)

    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """Two views of random images."""
        x = digits()[0]
        x = x[torch.randint(len(x), (examples,), generator=generator)]
        return self._view(x, generator), self._view(x, generator)

    def evaluate(self, model: Byol) -> dict[str, float]:
        """The probe's accuracy, and how much the projections differ from each other: 0 when all have collapsed."""
        x, y, x_test, y_test = digits()
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: self.labelled]
        right = probe(model.encoder(x[rows]), y[rows], model.encoder(x_test), y_test)
        projections = model.project(x_test[: len(x_test) // GROUP * GROUP])
        spread = (projections / projections.norm(dim=1, keepdim=True)).std(0).mean().item()
        return {"accuracy": right, "spread": spread}

    def _view(self, x: Tensor, generator: torch.Generator) -> Tensor:
        brightness = 0.7 + 0.6 * torch.rand(len(x), 1, generator=generator)
        return x * brightness + self.noise * torch.randn(x.shape, generator=generator)


def make(config: Config, options: argparse.Namespace) -> Distillation:
    """The experiment that `--config` names."""
    if options.config == "small":
        return Digits(config)
    return Folder(config, data=options.data, network=NETWORKS[options.config], device=options.device)


STUDY = Study(
    name="byol",
    description=__doc__,
    make=make,
    configs=CONFIGS,
    scales={"rule": None, "off": None, "adascale": None},
    metric="teacher_accuracy",
    draw=teacher_probe,
    progressive=PROGRESSIVE,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    runs.main(STUDY, arguments)


if __name__ == "__main__":
    main()
