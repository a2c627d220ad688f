"""BYOL's full configurations: two views of the images in an ImageNet folder, and ResNet-18 or a vision transformer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from recipes.ema.config import Config
from recipes.ema.distillation import Byol, Distillation, probe
from recipes.ema.nets import resnet18, unmoved_statistics, vit
from recipes.ema.stream import shuffled
from recipes.ema.train import Batch
from recipes.images.imagenet import MEAN, STD, Images, classes
from recipes.images.resnet import standardised
from recipes.training.task import DataError

PROBED = 20_000  # labelled images of each part that the probe sees
SIDE = 224


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Two random crops, each flipped half of the time, of every image."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i][0], self.images[i][0]


class Folder(Distillation):
    """BYOL on train/<class>/*.JPEG, probed on val/<class>/*.JPEG.

    Args:
        config: see `Config`.
        data: the folder with `train` and `val`.
        network: `"resnet"`, ResNet-18 with GroupNorm; `"resnet-bn"`, the same with BatchNorm; `"vit"`, ViT-S/16.
        tiny: small networks on images of 64x64, for a check of the whole path.
        device: where the networks are.
        workers: processes that load images.
    """

    def __init__(
        self, config: Config, *, data: Path | None, network: str, tiny: bool = False, device: str = "cpu",
        workers: int = 8,
    ) -> None:  # fmt: skip
        super().__init__(config, device=device)
        if data is None:
            raise DataError(
                "This configuration needs --data: the folder with train/<class>/*.JPEG and val/<class>/*.JPEG."
            )
        names, self.side = classes(data / "train"), 64 if tiny else SIDE
        self.views = Views(Images(data / "train", names, side=self.side, training=True))
        self.known = Images(data / "train", names, side=self.side, training=False)
        self.unknown = Images(data / "val", names, side=self.side, training=False)
        self.network, self.tiny, self.workers = network, tiny, workers
        self._order: torch.Generator | None = None

    def model(self) -> Byol:
        """The encoder, with heads 4096 and 256 wide."""
        small: dict[str, Any] = {}
        if self.tiny:
            vit_ = self.network == "vit"
            small = {"side": 64, "width": 32, "depth": 2, "heads": 2} if vit_ else {"width": 8, "blocks": 1}
        bn = self.network == "resnet-bn"
        encoder, count = vit(**small) if self.network == "vit" else resnet18(batch_norm=bn, **small)
        return Byol(encoder, count, hidden=32 if self.tiny else 4096, outputs=16 if self.tiny else 256)

    def targets(self, model: Byol, batch: Batch) -> Batch:
        """As ever, in colour; a teacher's forward leaves the student's running statistics."""
        first, second, *colours = batch
        with unmoved_statistics(model):
            return super().targets(model, (coloured(first, colours[0]), coloured(second, colours[1])))

    def batch(self, examples: int, generator: torch.Generator) -> Batch:
        """Two views of the next images in bytes, a quarter of what their numbers take, and the colours of each."""
        if self._order is not generator:  # another run
            self._order = generator
            chunk = max(1, self.config.base_batch // 4)
            place = {"seed": generator.initial_seed(), "start": self.start, "workers": self.workers}
            self._stream = shuffled(self.views, chunk=chunk, **place)
        views = [pixels.to(self.device) for pixels in self._stream.take(examples)]
        return (*views, *(colours(examples, generator).to(self.device) for _ in views))

    def evaluate(self, model: Byol) -> dict[str, float]:
        """The probe's accuracy, from at most `PROBED` images of each part."""
        parts = [self._features(model, images) for images in (self.known, self.unknown)]
        return {"accuracy": probe(*parts[0], *parts[1])}

    def _features(self, model: Byol, images: Images) -> tuple[Tensor, Tensor]:
        return features(model.encoder, images, batch=self.config.largest, device=self.device, workers=self.workers)


def features(
    encoder: nn.Module, images: Images, *, batch: int, device: torch.device, workers: int
) -> tuple[Tensor, Tensor]:
    """An encoder's features of at most `PROBED` images, and their labels."""
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:PROBED].tolist()
    found, labels = [], []
    for pixels, y in DataLoader(images, batch, sampler=rows, num_workers=workers):
        readable = y >= 0
        x = standardised(pixels[readable], mean=MEAN, std=STD).to(device)
        found.append(encoder(x).float())
        labels.append(y[readable].to(device))
    return torch.cat(found), torch.cat(labels)


def colours(images: int, generator: torch.Generator) -> Tensor:
    """Brightness and saturation `[images, 2]`, up to 40 % up or down; grey one time in five."""
    drawn = 0.6 + 0.8 * torch.rand(2, images, generator=generator)
    drawn[1, torch.rand(images, generator=generator) < 0.2] = 0.0
    return drawn.T


def coloured(pixels: Tensor, drawn: Tensor) -> Tensor:
    """Images `[n, 3, H, W]` in bytes with these `colours`, standardised."""
    brightness, saturation = drawn.T.view(2, -1, 1, 1, 1)
    x = pixels.float() / 255
    grey = x.mean(1, keepdim=True)
    x = ((grey + saturation * (x - grey)) * brightness).clamp(0, 1)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std
