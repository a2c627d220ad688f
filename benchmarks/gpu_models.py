"""Where `benchmarks.gpu` runs, and its models: GPT-2 124M and ResNet-50, with tiny forms of both for a rehearsal."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.optim import SGD, AdamW, Optimizer


class Place:
    """A GPU, or for a rehearsal a CPU.

    Args:
        rehearse: Whether models are tiny and a compiler does nothing.
    """

    def __init__(self, *, rehearse: bool) -> None:
        self.rehearse, self.gpu = rehearse, not rehearse
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.name = torch.cuda.get_device_name() if self.gpu else "a rehearsal on a CPU"

    def compiled(self, model: nn.Module, **options: Any) -> Any:
        """The model through torch.compile."""
        return torch.compile(model, backend="eager") if self.rehearse else torch.compile(model, **options)

    def synchronise(self) -> None:
        """Return when the device has done all work."""
        if self.gpu:
            torch.cuda.synchronize()


class Block(nn.Module):
    """Attention and an MLP, each after a LayerNorm and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length, width]` to the same."""
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[1](x)), approximate="tanh"))


class GPT2(nn.Module):
    """The loss of the next token; the last layer's weight is the embedding's."""

    def __init__(self, *, layers: int = 12, width: int = 768, words: int = 50257, length: int = 1024) -> None:
        super().__init__()
        self.words, self.length = words, length
        self.tokens, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, max(width // 64, 1)) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, length + 1]` to the mean loss."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        places = self.places(torch.arange(inputs.shape[1], device=tokens.device))
        hidden = self.norm(self.blocks(self.tokens(inputs) + places))
        logits = hidden @ self.tokens.weight.T
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def example(self, batch: int) -> Tensor:
        """Random tokens."""
        return torch.randint(self.words, (batch, self.length + 1))


def _convolution(into: int, out: int, size: int, stride: int = 1) -> Iterator[nn.Module]:
    yield nn.Conv2d(into, out, size, stride, padding=size // 2, bias=False)
    yield nn.BatchNorm2d(out)


class Bottleneck(nn.Module):
    """Three convolutions and a way around them."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        first, second = _convolution(into, width, 1), _convolution(width, width, 3, stride)
        self.inner = nn.Sequential(*first, nn.ReLU(), *second, nn.ReLU(), *_convolution(width, 4 * width, 1))
        around = _convolution(into, 4 * width, 1, stride) if into != 4 * width or stride > 1 else ()
        self.around = nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]`."""
        return (self.inner(x) + self.around(x)).relu()


class ResNet50(nn.Module):
    """The loss of a random class."""

    def __init__(self, *, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, size: int = 224) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = [*_convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        into = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(Bottleneck(into, width << stage, 2 if stage and not block else 1))
                into = 4 * (width << stage)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(into, 1000)
        for p in self.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images to the mean loss of classes that follow from their first pixels."""
        classes = (images[:, 0, 0, 0].float().abs() * 1000).long() % 1000
        return cross_entropy(self.head(self.layers(images).mean((2, 3))), classes)

    def example(self, batch: int) -> Tensor:
        """Random images, channels last."""
        return torch.randn(batch, 3, self.size, self.size).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Model:
    """A network with its optimizer.

    Args:
        batch: examples of a micro-batch; halved where the device has too little memory.
    """

    make: Callable[[], Any]
    tiny: Callable[[], Any]
    optimizer: Callable[[Any, bool], Optimizer]  # of the parameters, and whether they are on a GPU
    batch: int


MODELS = {
    "GPT-2 124M": Model(
        GPT2,
        lambda: GPT2(layers=1, width=16, words=50, length=8),
        lambda parameters, gpu: AdamW(parameters, lr=1e-5, fused=gpu),
        batch=8,
    ),
    "ResNet-50": Model(
        ResNet50,
        lambda: ResNet50(blocks=(1, 1), width=4, size=16),
        lambda parameters, _: SGD(parameters, lr=1e-4, momentum=0.9),
        batch=64,
    ),
}
