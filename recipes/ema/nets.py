"""Encoders of the full configurations, in torch alone: ResNet-18 and a vision transformer.

With GroupNorm and LayerNorm an example's features do not depend on the others of its micro-batch, so that the batch
size reaches the training through the optimizer and the EMA alone. With BatchNorm they depend on the micro-batch, whose
size is the same at every kappa.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class Block(nn.Module):
    """Two 3x3 convolutions, each with its normalisation, and a shortcut around them (He et al. 2016a)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            _norm(outputs, batch_norm),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            _norm(outputs, batch_norm),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), _norm(outputs, batch_norm)
            )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, H, W]` to `[B, outputs, H / stride, W / stride]`."""
        return (self.inner(x) + self.shortcut(x)).relu()


def resnet18(*, width: int = 64, blocks: int = 2, batch_norm: bool = False) -> tuple[nn.Module, int]:
    """Images `[B, 3, H, W]` to features `[B, 8 width]`; returns the network and the number of features."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        _norm(width, batch_norm),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    inputs = width
    for stage in range(4):
        for i in range(blocks):
            layers.append(Block(inputs, width * 2**stage, stride=2 if stage and i == 0 else 1, batch_norm=batch_norm))
            inputs = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs


class VisionTransformer(nn.Module):
    """Patches, learned positions, pre-norm transformer layers, and the mean over the patches (no class token).

    Args:
        side: of the images, in pixels; a multiple of `patch`.
        patch: side of a patch.
        width: of the residual stream.
        depth: layers.
        heads: of the attention.
        channels: of the images.
        spread: standard deviation of the positions at first.
    """

    def __init__(
        self, *, side: int, patch: int, width: int, depth: int, heads: int, channels: int = 3, spread: float = 0.02
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(spread * torch.randn(1, (side // patch) ** 2, width))
        layer = [
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        ]
        self.layers = nn.Sequential(*layer)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, channels, side, side]` to features `[B, width]`; smaller ones have the positions interpolated."""
        patches = self.patches(x)
        tokens = patches.flatten(2).transpose(1, 2) + self._positions(patches.shape[-1])
        return self.norm(self.layers(tokens)).mean(1)

    def _positions(self, count: int) -> Tensor:
        """Those of `count` by `count` patches."""
        own = round(self.positions.shape[1] ** 0.5)
        if count == own:
            return self.positions
        grid = self.positions.transpose(1, 2).unflatten(2, (own, own))
        return interpolate(grid, (count, count), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def vit(
    *, side: int = 224, patch: int = 16, width: int = 384, depth: int = 12, heads: int = 6
) -> tuple[nn.Module, int]:
    """ViT-S/16 by default; returns the network and the number of features."""
    return VisionTransformer(side=side, patch=patch, width=width, depth=depth, heads=heads), width


@contextmanager
def unmoved_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training, but its running statistics stay."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def _norm(width: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if batch_norm else nn.GroupNorm(8, width)
