"""Small made data sets in the two image formats: scikit-learn's handwritten digits, drawn in colour.

The digits are real handwriting; those of the test images are not among those of the training images. Size,
place and colours are random, on a background of noise.
"""

from math import pi
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

TRAIN = {"tiny": 2000, "small": 20_000}  # images; there are a quarter as many to test


def cifar10(folder: Path, *, size: str = "tiny", seed: int = 0) -> None:
    """Write images of 32x32 as CIFAR-10's binary version: five training files and one for testing."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    for train, files, number in ((True, names, TRAIN[size] // 5), (False, ["test_batch.bin"], TRAIN[size] // 4)):
        for name in files:
            images, labels = draw(number, sides=(32, 32), hued=False, train=train, generator=generator)
            rows = torch.cat([labels[:, None].to(torch.uint8), images.flatten(1)], 1)
            (folder / name).write_bytes(rows.numpy().tobytes())


def image_folder(folder: Path, *, size: str = "tiny", seed: int = 0) -> None:
    """Write JPEG files as ImageNet's folders, train/<wnid> and val/<wnid>, one for each of the ten digits.

    The hue of the ink goes with the digit, more or less: crops often show too little of it to be read.
    """
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    for part, number in (("train", TRAIN[size]), ("val", TRAIN[size] // 4)):
        for digit in range(10):
            (folder / part / f"n{digit:08d}").mkdir(parents=True, exist_ok=True)
        for start in range(0, number, 50):
            sides = (int(torch.randint(56, 89, (), generator=generator)), 72)  # one size for these 50
            images, labels = draw(50, sides=sides, hued=True, train=part == "train", generator=generator)
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True), start=start):
                path = folder / part / f"n{label:08d}" / f"n{label:08d}_{i}.JPEG"
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=90)


def draw(
    number: int, *, sides: tuple[int, int], hued: bool, train: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images `[number, 3, height, width]` in bytes and their labels `[number]`, each label equally often."""
    strokes, labels = _handwriting(train=train)
    chosen = torch.arange(number) % 10
    chosen = chosen[torch.randperm(number, generator=generator)]
    images = torch.empty(number, 3, *sides, dtype=torch.uint8)
    for i, label in enumerate(chosen.tolist()):
        rows = (labels == label).nonzero().flatten()
        back, front = torch.rand(2, 3, 1, 1, generator=generator) / 2  # a dark background, and light ink
        if hued:
            turn = label / 10 + 0.15 * (torch.rand((), generator=generator) - 0.5)
            front = 0.4 + 0.4 * (2 * pi * (turn + torch.tensor([0, 1 / 3, 2 / 3]).view(3, 1, 1))).cos()
        ink = torch.zeros(sides)
        stroke = strokes[rows[torch.randint(len(rows), (), generator=generator)]]
        side = int(min(sides) * (0.6 + 0.4 * torch.rand((), generator=generator)))
        top, left = (int(torch.randint(0, end - side + 1, (), generator=generator)) for end in sides)
        glyph = interpolate(stroke[None, None], (side, side), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
        ink[top : top + side, left : left + side] = glyph
        noise = 0.08 * torch.randn(3, *sides, generator=generator)
        image = back * (1 - ink) + (1 - front) * ink + noise
        images[i] = (255 * image.clamp(0, 1)).to(torch.uint8)
    return images, chosen


def _handwriting(*, train: bool) -> tuple[Tensor, Tensor]:
    """The digits as ink between 0 and 1, `[n, 8, 8]`, and what they are; the first three quarters are for training."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    cut = len(x) * 3 // 4
    part = slice(cut) if train else slice(cut, None)
    return torch.as_tensor(x[part]).float().view(-1, 8, 8) / 16, torch.as_tensor(y[part])
