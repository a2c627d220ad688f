"""The GPT of Radford et al. (2019), "Language models are unsupervised multitask learners", with GPT-2's own counts.

Differs from the paper in
    1. No dropout: a run goes about once through its text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


@dataclass(frozen=True)
class Shape:
    """Layers, heads of each, width, and the tokens that a prediction sees at most."""

    layers: int
    heads: int
    width: int
    context: int


SHAPES = {
    "tiny": Shape(layers=2, heads=4, width=64, context=64),
    "124M": Shape(layers=12, heads=12, width=768, context=1024),
    "350M": Shape(layers=24, heads=16, width=1024, context=1024),
}
GPT2_TOKENS = 50_257  # 256 bytes, 50,000 merges and the end of a text


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and added to what it saw."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, n, width]` to the same."""
        heads = self.qkv(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.mixed(seen.transpose(1, 2).flatten(2))
        return x + self.outer(nn.functional.gelu(self.inner(self.norms[1](x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens `[B, n]` to the logits of the token after each, `[B, n, vocabulary]`; one matrix embeds and predicts.

    Args:
        vocabulary: number of tokens.
        shape: one of `SHAPES`.
    """

    def __init__(self, vocabulary: int, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, shape.width), nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # What is added to the residual is made smaller by the root of how often that happens (section 2.3).
                added = name.endswith(("mixed.weight", "outer.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if added else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """At most `shape.context` tokens."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return linear(self.norm(x), self.tokens.weight)
