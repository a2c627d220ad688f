"""DINO, self-distillation with crops of two sizes, at any batch size.

    python -m recipes.ema.dino [--out docs/figures]                      the digits, a small vision transformer
    python -m recipes.ema.dino --config full --data DIR --device cuda    ViT-S/16 on an image folder

Learning rate, weight decay and the teacher's momentum follow their cosines on the clock. What was learned is measured
by a linear probe of the teacher, a ridge regression to the classes: on the digits from its outputs, for there the
features of a transformer's first weights are as good as any; on images from its features.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from anybatch._demo import digits
from recipes.ema import runs
from recipes.ema.config import Config
from recipes.ema.crops import CropFolder
from recipes.ema.distillation import GROUP, probe
from recipes.ema.multicrop import Dino, MultiCrop
from recipes.ema.nets import VisionTransformer
from recipes.ema.plots import teacher_probe
from recipes.ema.runs import Study
from recipes.ema.train import Batch

EPOCH = 1_281_167 / 1024  # base iterations of ImageNet's
CONFIGS = {
    "small": Config(
        base_batch=32, total=512, decay=0.99, final_decay=1.0, rate=1e-2, optimizer="adamw", weight_decay=0.04,
        final_weight_decay=0.4, warmup=50, cosine=True, scales=(1, 4, 8), seeds=4,
    ),
    # ViT-S/16 over 100 epochs as its authors train it: 5e-4 for 256 images, scaled linearly to 1024.
    "full": Config(
        base_batch=1024, total=round(100 * EPOCH), decay=0.996, final_decay=1.0, rate=2e-3, optimizer="adamw",
        weight_decay=0.04, final_weight_decay=0.4, warmup=round(10 * EPOCH), cosine=True, largest=256, evaluations=20,
        points=20, scales=(1, 2, 4), seeds=1,
    ),
}  # fmt: skip


class Digits(MultiCrop):
    """The digits: two crops of 8x8 and two of 4x4, with other brightness and noise; a transformer on patches of 2x2.

    Args:
        noise: standard deviation of what is added to the pixels, in standard deviations of the pixels.
        labelled: how many training images the probe sees.
    """

    noise, labelled = 0.3, 1000

    def __init__(self, config: Config) -> None:
        super().__init__(config, temperatures=(0.02, 0.02))

    def model(self) -> Dino:
        """One layer, 32 wide, on 16 tokens; 64 outputs."""
        encoder = VisionTransformer(side=8, patch=2, width=32, depth=1, heads=2, channels=1, spread=0.5)
        return Dino(encoder, 32, hidden=64, bottleneck=16, outputs=64, norms=True)

    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """Crops of random images."""
        x = digits()[0]
        images = x[torch.randint(len(x), (examples,), generator=generator)].view(-1, 1, 8, 8)
        large = [self._crop(images, (0.7, 1.0), 8, generator) for _ in range(2)]
        small = [self._crop(images, (0.4, 0.7), 4, generator) for _ in range(2)]
        return torch.stack(large, 1), torch.stack(small, 1)

    def evaluate(self, model: Dino) -> dict[str, float]:
        """The probe's accuracy, and the entropy of the mean output: 0 when one has won everywhere."""
        x, y, x_test, y_test = digits()
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: self.labelled]
        known, unknown = self._outputs(model, x[rows]), self._outputs(model, x_test[: len(x_test) // GROUP * GROUP])
        mean = unknown.mean(0)
        right = probe(known, y[rows], unknown, y_test[: len(unknown)])
        return {"accuracy": right, "entropy": -mean.xlogy(mean).sum().item()}

    def _outputs(self, model: Dino, x: Tensor) -> Tensor:
        """The distribution over the outputs, `[n, K]`, as a teacher's."""
        return ((model(x.view(-1, 1, 1, 8, 8))[:, 0] - model.centre) / self.temperatures[1]).softmax(-1)

    def _crop(self, images: Tensor, area: tuple[float, float], side: int, generator: torch.Generator) -> Tensor:
        """A square of a share of each image within `area`, anywhere in it, as `side` by `side` pixels."""
        n = len(images)
        share = (area[0] + (area[1] - area[0]) * torch.rand(n, generator=generator)).sqrt()
        shift = (1 - share)[:, None] * (2 * torch.rand(n, 2, generator=generator) - 1)
        theta = torch.cat([share[:, None, None] * torch.eye(2), shift[:, :, None]], 2)
        crops = grid_sample(images, affine_grid(theta, [n, 1, side, side], align_corners=False), align_corners=False)
        brightness = 0.7 + 0.6 * torch.rand(n, 1, 1, 1, generator=generator)
        return crops * brightness + self.noise * torch.randn(crops.shape, generator=generator)


def make(config: Config, options: argparse.Namespace) -> MultiCrop:
    """The experiment that `--config` names."""
    if options.config == "small":
        return Digits(config)
    return CropFolder(config, data=options.data, device=options.device)


STUDY = Study(
    name="dino",
    description=__doc__,
    make=make,
    configs=CONFIGS,
    scales={"rule": None, "off": None, "adascale": None},
    metric="teacher_accuracy",
    draw=teacher_probe,
    compared=tuple((arm, kappa) for arm in ("rule", "off", "adascale") for kappa in (4, 8)),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    runs.main(STUDY, arguments)


if __name__ == "__main__":
    main()
