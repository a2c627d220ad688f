"""ImageNet with ResNet-50 v1: base batch 256, 451,000 base iterations (90 epochs), steps of 0.1 at 150k, 300k, 400k.

The paper gives these, learning rate 0.1, momentum 0.9, weight decay 1e-4, and 76.4 % for scale 1. Training images are
crops of a random 8 to 100 % of the area, resized and flipped half of the time; test images are the centre of the image
with its shorter side at 256 (He et al. 2016a, Goyal et al. 2017).
"""

import os
import warnings
from collections.abc import Sequence
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import Dataset, default_collate

from recipes.images import made
from recipes.images.counted import Counted
from recipes.images.resnet import imagenet_resnet_v1, standardised
from recipes.training.sharing import ALONE, Share
from recipes.training.task import DataError, Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images
MILESTONES = (150 / 451, 300 / 451, 400 / 451)  # shares of the run
UNREADABLE = 0.01  # the share of images that may be broken
_SUFFIXES = {".jpeg", ".jpg", ".png"}
make = made.image_folder


class ImageNet(Task):
    """1.28 million images in 1000 classes, as folders train/<wnid>/*.JPEG and val/<wnid>/*.JPEG."""

    name = "imagenet"
    metric = "accuracy"
    convolutions = True

    def __init__(self, data: Path | None, *, tiny: bool = False) -> None:
        super().__init__(data, tiny=tiny)
        self.base_batch, self.total, self.rate = (16, 600, 0.1) if tiny else (256, 451_000, 0.1)
        side = 64 if tiny else 224
        if data is None:
            raise DataError("imagenet needs --data: the folder with train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.")
        self.classes = classes(data / "train")
        self.train_set = Images(data / "train", self.classes, side=side, training=True)
        self.test_set = Images(data / "val", self.classes, side=side, training=False)

    def model(self) -> nn.Module:
        """ResNet-50 v1; tiny: 8 channels in place of 64, one block in each stage."""
        n = len(self.classes)
        return imagenet_resnet_v1(n, width=8, depths=(1, 1, 1, 1)) if self.tiny else imagenet_resnet_v1(n)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """SGD with momentum and weight decay."""
        return SGD(model.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-4)

    def scheduler(self, optimizer: Optimizer) -> Any:
        """A tenth of the rate after each milestone."""
        return MultiStepLR(optimizer, [round(share * self.total) for share in MILESTONES])

    def collate(self, examples: list[Any]) -> Any:
        """Images in bytes, and labels."""
        return default_collate(examples)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross entropy; the images become numbers where the model is, for bytes are a quarter of them."""
        x, y = batch
        return cross_entropy(model(standardised(x, mean=MEAN, std=STD)), y)

    def evaluate(self, model: nn.Module, device: torch.device, share: Share = ALONE) -> dict[str, float]:
        """Top-1 accuracy in percent, over the images that could be read."""
        found, number = Counted(device), len(self.test_set)
        parts = share.of([list(range(i, min(i + 250, number))) for i in range(0, number, 250)])
        batches = self.tested(self.test_set, [part for part, _ in parts], collate=self.collate)
        for (images, y), (_, counts) in zip(batches, parts, strict=True):
            readable = y >= 0
            x = standardised(images[readable].to(device, non_blocking=True), mean=MEAN, std=STD)
            logits = model(x).float()
            if counts:
                found.add(logits, y[readable].to(device))
        return found.over(share)


class Images(Dataset[tuple[Tensor, int]]):
    """The images under `folder`; the label is the place of an image's folder in `classes`.

    An image that cannot be read is replaced by the next one in training, and has label -1 in testing. The first one is
    a warning; more than 1 % of all, but at least two, is an error.

    Raises:
        DataError: a class has no folder or no image, or there is a folder of an unknown class.
    """

    def __init__(self, folder: Path, classes_: list[str], *, side: int, training: bool) -> None:
        found = classes(folder)
        strangers = sorted(set(classes_) ^ set(found))
        if strangers:
            raise DataError(
                f"{folder / strangers[0]}: train and val must have the same classes; this one is in one of them."
            )
        self.side, self.training = side, training
        self.files = Files([folder / name for name in classes_])
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.files[i]
        try:
            with Image.open(path) as image:
                return self.pixels(image.convert("RGB")), label
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            self.skip(i, str(error))
        return self[(i + 1) % len(self)] if self.training else (torch.zeros(3, self.side, self.side).byte(), -1)

    def skip(self, i: int, error: str) -> None:
        """Count image `i` as unreadable. Each loading process counts for itself."""
        self.broken[i] = error
        if len(self.broken) == 1:
            instead = "the next image takes its place" if self.training else "it is left out"
            warnings.warn(f"{self.files[i][0]} cannot be read ({error}): {instead}.", UserWarning, stacklevel=3)
        if len(self.broken) > max(1, UNREADABLE * len(self)):
            some = ", ".join(str(self.files[j][0]) for j in list(self.broken)[:3])
            raise DataError(f"{len(self.broken)} of {len(self)} images cannot be read, among them {some}.")

    def pixels(self, image: Image.Image) -> Tensor:
        """`[3, side, side]` in bytes."""
        box = random_box(*image.size) if self.training else centre_box(*image.size)
        pixels = image.resize((self.side, self.side), Image.Resampling.BILINEAR, box=box)
        tensor = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(self.side, self.side, 3)
        tensor = tensor.permute(2, 0, 1)
        return tensor.flip(2) if self.training and torch.rand(()) < 0.5 else tensor


class Files:
    """The images in each of `folders`, sorted, with the number of their folder: the label.

    Their names are in one array. To look at a Python object is to count a reference in it, so that with a million of
    them every loading process would come to own a copy: 0.5 GB, times the workers, times the ranks.

    Raises:
        DataError: a folder has no image.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders, names = folders, []
        for folder in folders:
            found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
            if not found:
                raise DataError(f"{folder} holds no .JPEG, .jpg or .png image.")
            names.append(np.array([os.fsencode(name) for name in found]))
        self.names = np.concatenate(names)
        self.labels = np.repeat(np.arange(len(folders)), [len(some) for some in names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Path, int]:
        label = int(self.labels[i])
        return self.folders[label] / os.fsdecode(bytes(self.names[i])), label


def classes(folder: Path) -> list[str]:
    """The folders in `folder`, sorted: the classes."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: ImageNet is read from train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not found:
        raise DataError(f"{folder} holds no class folders.")
    return found


def random_box(
    width: int, height: int, *, share: tuple[float, float] = (0.08, 1.0)
) -> tuple[float, float, float, float]:
    """A random share of the area, with sides of 3:4 to 4:3; the whole centre where ten attempts do not fit."""
    for _ in range(10):
        area, ratio, x, y = torch.rand(4).tolist()
        area = (share[0] + (share[1] - share[0]) * area) * width * height
        ratio = exp((2 * ratio - 1) * log(4 / 3))
        w, h = sqrt(area * ratio), sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = x * (width - w), y * (height - h)
            return left, top, left + w, top + h
    return centre_box(width, height, share=1.0)


def centre_box(width: int, height: int, *, share: float = 224 / 256) -> tuple[float, float, float, float]:
    """The square in the centre, of `share` of the shorter side."""
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
