"""The two residual networks of the paper: ResNet-18 v2 for CIFAR-10 and ResNet-50 v1 for ImageNet."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn


class PreActivation(nn.Module):
    """Two 3x3 convolutions, each after its normalisation and ReLU (He et al. 2016b, Figure 1b)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, size=3, stride=stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, size=3)
        changes = stride != 1 or inputs != outputs
        self.shortcut = _conv(inputs, outputs, size=1, stride=stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape `[B, inputs, H, W]`; where the shape changes, the shortcut starts after the activation."""
        active = self.norm1(x).relu()
        residual = self.conv2(self.norm2(self.conv1(active)).relu())
        return residual + (x if self.shortcut is None else self.shortcut(active))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each followed by its normalisation (He et al. 2016a, Figure 5).

    "v1": the stride is in the first 1x1 convolution, as in the paper; torchvision's has it in the 3x3. The last gamma
    starts at 0, so that the block starts as the identity (Goyal et al. 2017).
    """

    def __init__(self, inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = _conv(inputs, width, size=1, stride=stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, size=3)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, size=1)
        self.norm3 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.norm3.weight)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, size=1, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape `[B, inputs, H, W]`."""
        residual = self.norm1(self.conv1(x)).relu()
        residual = self.norm2(self.conv2(residual)).relu()
        residual = self.norm3(self.conv3(residual))
        return (residual + (x if self.shortcut is None else self.shortcut(x))).relu()


def cifar_resnet_v2(classes: int, *, width: int = 64, depths: Sequence[int] = (2, 2, 2, 2)) -> nn.Sequential:
    """ResNet-18 v2 in its form for images of 32x32: a 3x3 stem of stride 1, and no pooling before the end."""
    stages, inputs = [], width
    for i, depth in enumerate(depths):
        outputs = width * 2**i
        stages += [
            PreActivation(inputs if j == 0 else outputs, outputs, stride=1 + (i > 0 and j == 0)) for j in range(depth)
        ]
        inputs = outputs
    end = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(_conv(3, width, size=3), *stages, *end)


def imagenet_resnet_v1(classes: int, *, width: int = 64, depths: Sequence[int] = (3, 4, 6, 3)) -> nn.Sequential:
    """ResNet-50 v1: a 7x7 stem and a maximum, both of stride 2, then four stages of bottlenecks."""
    stages, inputs = [], width
    for i, depth in enumerate(depths):
        for j in range(depth):
            stages.append(Bottleneck(inputs, width * 2**i, stride=1 + (i > 0 and j == 0)))
            inputs = 4 * width * 2**i
    stem = [_conv(3, width, size=7, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    head = nn.Linear(inputs, classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def _conv(inputs: int, outputs: int, *, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size but for its stride, without a bias: a normalisation follows somewhere."""
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015
    return conv


def standardised(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels `[B, 3, H, W]` in bytes as numbers of mean 0 and deviation 1 over the data set, for each channel."""
    shift, width = (_channels(tuple(values), images.device) for values in (mean, std))
    return (images.float() / 255 - shift) / width


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)  # copied once: the copy is waited for
