"""The Transformer of Vaswani et al. (2017, arXiv 1706.03762), and its beam search.

Differs from the paper in
    1. Layers are normalised at their input, and once more at the end of each stack, as in the authors' later code
       (tensor2tensor): SGD without a warm-up does not train the original order.
    2. Without a cache, decoding computes the prefix anew at every step.
"""

import math

import torch
from torch import Tensor, nn

PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3
LENGTH_PENALTY = 0.6  # alpha of the paper, section 6.1
LONGER = 50  # a translation has at most so many tokens more than its source, as in the paper


class Attention(nn.Module):
    """Multi-head attention of `x` over `memory`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, memory: Tensor, *, allowed: Tensor) -> Tensor:
        """Of `[B, n, width]` and `[B, m, width]`; `allowed` is true where query n may see m, `[B or 1, n or 1, m]`."""
        q, k, v = (
            linear(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed.unsqueeze(1))
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One layer of the encoder, or with `cross` of the decoder."""

    def __init__(self, width: int, heads: int, inner: int, *, cross: bool, dropout: float) -> None:
        super().__init__()
        self.own = Attention(width, heads)
        self.cross = Attention(width, heads) if cross else None
        self.inner = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, *, allowed: Tensor, memory: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """`allowed` and `seen` say what of `x` and what of `memory` each position may look at."""
        y = self.norms[0](x)
        x = x + self.dropout(self.own(y, y, allowed=allowed))
        if self.cross is not None and memory is not None and seen is not None:
            x = x + self.dropout(self.cross(self.norms[1](x), memory, allowed=seen))
        return x + self.dropout(self.inner(self.norms[-1](x)))


class TransformerModel(nn.Module):
    """Source and target tokens to logits; one matrix embeds both and gives the logits.

    Args:
        vocabulary: tokens, of both languages together.
        width: d_model.
        heads: of each attention.
        inner: units of the feed-forward layers.
        layers: of the encoder, and as many of the decoder.
        dropout: on the embeddings and on what each sub-layer adds.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 512,
        heads: int = 8,
        inner: int = 2048,
        layers: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.encoder, self.decoder = (
            nn.ModuleList(Layer(width, heads, inner, cross=cross, dropout=dropout) for _ in range(layers))
            for cross in (False, True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, source: Tensor, target: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits `[B, n, vocabulary]` of the token after each of `target`, and the memory.

        Args:
            source: `[B, m]`.
            target: `[B, n]`; begins with BEGIN.
            memory: of these sources, `[B, m, width]`, where it is known already.
        """
        n = target.shape[1]
        real = (source != PAD).unsqueeze(1)
        past = torch.ones(n, n, dtype=torch.bool, device=target.device).tril().unsqueeze(0)
        if memory is None:
            memory = self._embedded(source)
            for layer in self.encoder:
                memory = layer(memory, allowed=real)
            memory = self.norms[0](memory)
        x = self._embedded(target)
        for layer in self.decoder:
            x = layer(x, allowed=past, memory=memory, seen=real)
        return nn.functional.linear(self.norms[1](x), self.embedding.weight), memory

    def _embedded(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * math.sqrt(self.width)
        return self.dropout(x + sinusoids(tokens.shape[1], self.width, device=tokens.device))


def sinusoids(length: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """The position codes `[length, width]`: sines in the even columns, cosines in the odd ones (section 3.5)."""
    position = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    return torch.stack(((position * rate).sin(), (position * rate).cos()), dim=2).flatten(1)


@torch.no_grad()
def translate(model: nn.Module, source: Tensor, *, beam: int = 4, longer: int = LONGER) -> list[list[int]]:
    """The best target found for each source `[B, m]`, without BEGIN and END; the model is in eval mode.

    Of all targets, each step keeps the `beam` most probable that have not ended, and the best that has. A target Y that
    ended is judged by `log P(Y) / ((5 + |Y|) / 6) ** LENGTH_PENALTY`, with END counted in |Y|; |Y| is at most
    `m + longer`. With `beam=1` the most probable token is followed, as in greedy decoding.
    """
    rows, device = len(source), source.device
    source = source.repeat_interleave(beam, 0)
    memory = None
    tokens = torch.full((rows * beam, 1), BEGIN, device=device)
    scores = torch.full((rows, beam), -math.inf, device=device)
    scores[:, 0] = 0.0  # all beams of a row are the same at first: one is enough
    best_score = torch.full((rows,), -math.inf, device=device)
    best: list[list[int]] = [[] for _ in range(rows)]
    limit = source.shape[1] + longer
    for length in range(1, limit + 1):
        logits, memory = model(source, tokens, memory)
        log_probs = logits[:, -1].float().log_softmax(1)
        log_probs[:, [PAD, BEGIN]] = -math.inf
        total = scores.unsqueeze(2) + log_probs.unflatten(0, (rows, beam))
        ended, parent = total[:, :, END].max(1)
        ended = ended / _penalty(length)
        for row in (ended > best_score).nonzero().flatten().tolist():
            best[row] = tokens[row * beam + int(parent[row]), 1:].tolist()
        best_score = torch.maximum(best_score, ended)
        total[:, :, END] = -math.inf
        scores, chosen = total.flatten(1).topk(beam, dim=1)
        if bool((scores[:, 0] / _penalty(limit) <= best_score).all()):
            break  # no longer target can be better any more
        vocabulary = total.shape[2]
        rows_chosen = (torch.arange(rows, device=device).unsqueeze(1) * beam + chosen // vocabulary).flatten()
        tokens = torch.cat((tokens[rows_chosen], (chosen % vocabulary).view(-1, 1)), dim=1)
    return best


def _penalty(length: int) -> float:
    return ((5 + length) / 6) ** LENGTH_PENALTY
