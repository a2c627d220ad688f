"""The models of `benchmarks.overhead`: few large tensors, many small ones, and what lies between."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=1e-6, momentum=0.9),
    "AdamW": lambda parameters: AdamW(parameters, lr=1e-6),
}


class Stack(nn.Module):
    """`blocks` one after the other, and a way in and out."""

    def __init__(self, first: nn.Module, blocks: list[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.last = first, nn.ModuleList(blocks), last

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Sequential."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Embedded(nn.Module):
    """Rows of a table, with a place each."""

    def __init__(self, words: int, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.place = nn.Parameter(torch.zeros(length, width))

    def forward(self, x: Tensor) -> Tensor:
        """Words to rows."""
        return self.table(x) + self.place


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    return Stack(nn.Identity(), layers, nn.Identity())


def convolutions() -> nn.Module:
    def block(a: int, b: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

    sizes = [(3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return Stack(nn.Identity(), [block(*size) for size in sizes], last)


def transformer() -> nn.Module:
    blocks: list[nn.Module] = [
        nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True) for _ in range(6)
    ]
    return Stack(Embedded(1000, 64, 256), blocks, nn.LayerNorm(256))


@dataclass(frozen=True)
class Model:
    """A model and one micro-batch for it."""

    make: Callable[[], nn.Module]
    example: Callable[[], Tensor]

    def parameters(self) -> int:
        """How many entries it has."""
        return sum(p.numel() for p in self.make().parameters())


MODELS = {
    "mlp": Model(lambda: mlp(1024, 2048, 2048, 1536, 256), lambda: torch.randn(32, 1024)),
    "conv": Model(convolutions, lambda: torch.randn(8, 3, 32, 32)),
    "transformer": Model(transformer, lambda: torch.randint(1000, (2, 64))),
    "layers": Model(lambda: mlp(*[64] * 61), lambda: torch.randn(32, 64)),
    "tiny": Model(lambda: mlp(*[8] * 501), lambda: torch.randn(8, 8)),
}
