"""YOLOv3 (Redmon and Farhadi, 2018): Darknet-53, three scales that share a pyramid of features, three anchors each.

The model's output is `[B, P, 5 + classes]`, P predictions in the order of `boxes.Grid`, each `x, y, width, height,
objectness, classes` before any sigmoid or exponential.
"""

import array
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.training.task import DataError

STRIDES = (32, 16, 8)
# For an input of 416 pixels, coarse scale first: section 2.3 of the paper (clusters of COCO's boxes).
ANCHORS = (((116, 90), (156, 198), (373, 326)), ((30, 61), (62, 45), (59, 119)), ((10, 13), (16, 30), (33, 23)))
BLOCKS = (1, 2, 8, 8, 4)  # residual blocks between two halvings: Table 1
OBJECT_PRIOR = 0.01  # nearly all of the ten thousand predictions see no object; the loss need not learn that first


def anchors(size: int) -> Tensor:
    """The nine anchors `[3, 3, 2]` for an input of `size` pixels."""
    return torch.tensor(ANCHORS, dtype=torch.float32) * (size / 416)


def conv(ins: int, outs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, leaky ReLU of slope 0.1: every layer but the last of each scale."""
    layer = nn.Conv2d(ins, outs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outs), nn.LeakyReLU(0.1, inplace=True))


class Residual(nn.Module):
    """A 1x1 layer to half the width and a 3x3 layer back, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(width, width // 2, 1), conv(width // 2, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """`x` plus what the two layers make of it."""
        change: Tensor = self.layers(x)
        return x + change


class Darknet(nn.Module):
    """Darknet-53 without its classifier: 52 convolutions, with `width` 32 and the paper's blocks."""

    def __init__(self, width: int = 32, blocks: Sequence[int] = BLOCKS) -> None:
        super().__init__()
        self.stem = conv(3, width, 3)
        stages = []
        for i, count in enumerate(blocks):
            outs = width * 2 ** (i + 1)
            stages.append(nn.Sequential(conv(outs // 2, outs, 3, 2), *(Residual(outs) for _ in range(count))))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The features at strides 8, 16 and 32."""
        x, features = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[-3:]

    def load_darknet(self, path: Path) -> None:
        """Read Darknet's own file of weights (`darknet53.conv.74`): a header, then each layer's floats in order.

        A layer has the normalisation's bias, weight, running mean and running variance, then the convolution's weights.
        """
        layers = [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        tensors: list[Tensor] = []
        for layer, norm in zip(layers[::2], layers[1::2], strict=True):
            tensors += [norm.bias, norm.weight, norm.running_mean, norm.running_var, layer.weight]  # type: ignore[list-item]
        data = _floats(path)
        if len(data) != sum(t.numel() for t in tensors):
            raise DataError(f"{path}: {len(data)} numbers, where the backbone has {sum(t.numel() for t in tensors)}.")
        with torch.no_grad():
            for tensor, values in zip(tensors, data.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(values.view_as(tensor))


def _floats(path: Path) -> Tensor:
    """The numbers of a file of Darknet's; from version 0.2 on, the count of images seen in the header has 8 bytes."""
    data = path.read_bytes()
    version = tuple(int.from_bytes(data[i : i + 4], "little") for i in (0, 4))
    values = array.array("f")
    try:
        values.frombytes(data[20 if version >= (0, 2) else 16 :])
    except ValueError as error:
        raise DataError(f"{path}: not a whole number of floats; is the file truncated?") from error
    if sys.byteorder == "big":
        values.byteswap()
    return torch.tensor(values)


class Head(nn.Module):
    """Five layers over one scale's features, then its predictions; what the next scale takes comes from the fifth."""

    def __init__(self, ins: int, width: int, outs: int) -> None:
        super().__init__()
        narrow = [conv(ins, width, 1), conv(width, 2 * width, 3), conv(2 * width, width, 1)]
        self.layers = nn.Sequential(*narrow, conv(width, 2 * width, 3), conv(2 * width, width, 1))
        self.last = nn.Sequential(conv(width, 2 * width, 3), nn.Conv2d(2 * width, outs, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features for the next scale, and the predictions."""
        x = self.layers(x)
        return x, self.last(x)


class YoloV3(nn.Module):
    """The whole detector.

    Args:
        classes: number of classes.
        width: channels of the first layer; the paper's is 32.
        blocks: residual blocks of the five stages.
    """

    def __init__(self, classes: int = 20, *, width: int = 32, blocks: Sequence[int] = BLOCKS) -> None:
        super().__init__()
        self.outputs = 5 + classes
        self.backbone = Darknet(width, blocks)
        widths = [width * 2**i for i in (5, 4, 3)]
        self.heads, self.lifts = nn.ModuleList(), nn.ModuleList()
        for i, features in enumerate(widths):
            lifted = features // 2 if i else 0
            self.heads.append(Head(features + lifted, features // 2, 3 * self.outputs))
            if i:
                self.lifts.append(nn.Sequential(conv(features, features // 2, 1), nn.Upsample(scale_factor=2)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1)
        for head in self.heads:
            self._quiet(*head.get_submodule("last.1").parameters())

    @torch.no_grad()
    def _quiet(self, weight: Tensor, bias: Tensor) -> None:
        """Small first predictions: an objectness of `OBJECT_PRIOR`, and all classes alike."""
        weight.normal_(std=0.01)
        one = torch.zeros(3, self.outputs)
        one[:, 4], one[:, 5:] = -math.log(1 / OBJECT_PRIOR - 1), -math.log(max(self.outputs - 6, 1))
        bias.copy_(one.flatten())

    def forward(self, images: Tensor) -> Tensor:
        """Predictions `[B, P, 5 + classes]` for images `[B, 3, size, size]` with values from 0 to 1."""
        found, carried = [], None
        for i, (features, head) in enumerate(zip(reversed(self.backbone(images)), self.heads, strict=True)):
            x = features if carried is None else torch.cat([self.lifts[i - 1](carried), features], 1)
            carried, out = head(x)
            batch, _, rows, columns = out.shape
            out = out.view(batch, 3, self.outputs, rows, columns).permute(0, 1, 3, 4, 2)
            found.append(out.reshape(batch, -1, self.outputs))
        return torch.cat(found, 1)
