"""What rows that seldom get a gradient do to the gain in Adam's metric: an embedding of words drawn by Zipf's law.

    python -m benchmarks.rare_rows [--words 20000] [--steps 60]

Both gains at S = 8 of the same kind of run: the Euclidean one, and that of `AdaScale(metric="adam")`.
"""

import argparse
from statistics import fmean

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import anybatch

BASE, LENGTH, SCALE, CLASSES = 8, 16, 8, 10


class Bag(nn.Module):
    """The mean of the words' embeddings, classified."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(words, 32), nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, LENGTH]` words to logits."""
        found: torch.Tensor = self.last(self.embedding(x).mean(1))
        return found


def gains(metric: str, *, words: int, steps: int, seed: int = 0) -> list[float]:
    """The gain of each step; the class is the number of frequent words, which can be learned."""
    torch.manual_seed(seed)
    frequency = 1 / torch.arange(1, words + 1, dtype=torch.float64)
    net = Bag(words)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    rule = anybatch.AdaScale(metric="adam" if metric == "adam" else "euclidean", noise_factor=1.0)
    controller = anybatch.attach(optimizer, model=net, rule=rule, total=4000, base_batch=BASE, micro_batch=BASE)
    found = []
    for _ in range(steps):
        for _ in range(SCALE):
            x = torch.multinomial(frequency, BASE * LENGTH, replacement=True).view(BASE, LENGTH)
            (cross_entropy(net(x), (x < CLASSES).sum(1).clamp(max=CLASSES - 1)) / SCALE).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(controller.gain)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for words in (100, options.words):
        for metric in ("euclidean", "adam"):
            found = gains(metric, words=words, steps=options.steps)
            print(f"{words:6} words, {metric:9}: mean gain of the last half {fmean(found[len(found) // 2 :]):.2f}")


if __name__ == "__main__":
    main()
