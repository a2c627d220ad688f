"""A small GPT on the bytes of a text file, in the manner of nanoGPT: AdamW, clipping, bfloat16, a rate set by hand.

    python examples/language.py                              # python's own documentation, at the batch it was tuned for
    python examples/language.py --scale 8                    # eight times the batch, nothing else changed
    python examples/language.py --text shakespeare.txt --total 2000

What anybatch adds to such a loop are three lines: `attach`, the loop's condition, and the rate's argument, which is the
clock's iteration in place of the number of steps. Learning rate, betas, weight decay, warm-up and the length of the run
are those of the base batch, at any `--scale`.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import anybatch

BASE_BATCH, CONTEXT, WIDTH, LAYERS, HEADS = 4, 32, 64, 2, 4
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 2e-3, (0.9, 0.99), 0.1, 1.0
LARGEST = 8  # passages of one backward: what fits into memory


def main() -> None:
    """Train, and print what it came to."""
    parser = argparse.ArgumentParser(description="A small GPT at any batch size.")
    parser.add_argument("--text", type=Path, help="a plain text file; python's own documentation by default")
    parser.add_argument("--scale", type=int, default=1, help="the batch, in base batches of 4 passages")
    parser.add_argument("--total", type=int, default=1000, help="base iterations of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data")
    options = parser.parse_args()
    print(json.dumps(train(**vars(options))))


def train(*, text: Path | None = None, scale: int = 1, total: int = 1000, seed: int = 0) -> dict[str, float]:
    """One run; returns the validation loss, the steps and the bytes seen."""
    torch.manual_seed(seed)
    data = read(text)
    cut = len(data) * 9 // 10
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    micro_batch = min(LARGEST, BASE_BATCH * scale // 2)  # two backwards or more: one alone shows no noise
    accumulation = BASE_BATCH * scale // micro_batch
    controller = anybatch.attach(optimizer, model=model, total=total, base_batch=BASE_BATCH, micro_batch=micro_batch)

    while not controller.done:
        for group in optimizer.param_groups:
            group["lr"] = rate(controller.clock.iteration, total)
        for _ in range(accumulation):
            x, y = passages(data[:cut], micro_batch)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = cross_entropy(model(x).flatten(0, 1), y.flatten())
            (loss / accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    controller.detach()
    seen = controller.steps * scale * BASE_BATCH * CONTEXT
    return {
        "loss": validate(model, data[cut:]),
        "steps": controller.steps,
        "bytes": seen,
        "gain": total / controller.steps,
    }


def rate(iteration: int, total: int) -> float:
    """Warm-up over 5 % of the run, then a cosine to a tenth; in base iterations, as tuned at the base batch."""
    if iteration < 0.05 * total:
        return LEARNING_RATE * (iteration + 1) / (0.05 * total + 1)
    share = min(1.0, (iteration - 0.05 * total) / (0.95 * total))
    return LEARNING_RATE * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def read(text: Path | None) -> Tensor:
    """The bytes of the file; by default, of what `help()` has to say about python."""
    if text is not None:
        return torch.tensor(list(text.read_bytes()))
    from pydoc_data.topics import topics

    return torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))


def passages(data: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`n` passages at random places, and the byte after each of their bytes."""
    starts = torch.randint(len(data) - CONTEXT, (n, 1))
    rows = starts + torch.arange(CONTEXT + 1)
    return data[rows[:, :-1]], data[rows[:, 1:]]


@torch.no_grad()
def validate(model: nn.Module, data: Tensor, n: int = 256) -> float:
    """The mean loss over `n` passages evenly spread over the rest of the text, nats a byte."""
    rows = torch.linspace(0, len(data) - CONTEXT - 1, n).long()[:, None] + torch.arange(CONTEXT + 1)
    return cross_entropy(model(data[rows[:, :-1]]).flatten(0, 1), data[rows[:, 1:]].flatten()).item()


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, CONTEXT, WIDTH]` to the same."""
        heads = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.bytes.weight
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, CONTEXT]` of bytes to `[n, CONTEXT, 256]`."""
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places.weight)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
