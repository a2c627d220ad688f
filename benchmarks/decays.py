"""Decays on the clock against constant ones: final losses on the digits, for Adam and for SGD with momentum.

    python -m benchmarks.decays [--seeds 4]

Each row trains the demo's network with hyperparameters for a base batch of 8, T_SI = 3000.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import anybatch
from benchmarks.digits import Losses, Row, table, train

Optimizers = Callable[..., torch.optim.Optimizer]
MAKERS: dict[str, Optimizers] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.9, 0.99)),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
}


def rows() -> Iterator[Row]:
    for name, make in MAKERS.items():
        for scale in (1, 8, 32):
            rules: dict[str, anybatch.Rule] = {
                "AdaScale, decays on the clock": anybatch.AdaScale(decays="clock"),
                "AdaScale, decays constant": anybatch.AdaScale(decays="constant"),
            }
            if name == "Adam":
                rules["square root, decays on the clock"] = anybatch.SquareRoot(decays="clock")
                rules["square root, decays constant"] = anybatch.SquareRoot(decays="constant")
            if scale == 1:
                rules = {"any rule": anybatch.Identity()}
            for label, rule in rules.items():
                run = partial(_run, make, rule, scale)
                yield f"{name}, {label}", scale, run


def _run(make: Optimizers, rule: anybatch.Rule, scale: int, seed: int) -> Losses:
    return train(make, rule, base=8, total=3000, scale=scale, seed=seed)


if __name__ == "__main__":
    table(__doc__, rows)
