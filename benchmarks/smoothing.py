"""The averages of AdaScale's moments: the paper's estimator against a horizon on the clock, on the digits.

    python -m benchmarks.smoothing [--seeds 4]

On a short run 1000/S iterations, the paper's memory, are a large part of the run; 1 % of the run on the clock is not.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import anybatch
from benchmarks.digits import Losses, Row, table, train

ESTIMATORS = {
    "paper: clip, then 1 - S/1000": anybatch.AdaScale(estimator="paper", smoothing="paper"),
    "unbiased: 1 - S/1000": anybatch.AdaScale(smoothing="paper"),
    "unbiased: 1 % of the run (the default)": anybatch.AdaScale(),
}
Optimizers = Callable[..., torch.optim.Optimizer]
TASKS: dict[str, tuple[int, int, Optimizers]] = {
    "B0=16, T=3000, no momentum": (16, 3000, lambda p: torch.optim.SGD(p, lr=0.1)),
    "B0=8, T=4000, momentum .9": (8, 4000, lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
}


def rows() -> Iterator[Row]:
    for task, (base, total, make) in TASKS.items():
        print(task)
        for scale in (8, 32, 128):
            for label, rule in ESTIMATORS.items():
                yield f"  {label}", scale, partial(_run, make, rule, base, total, scale)


def _run(make: Optimizers, rule: anybatch.Rule, base: int, total: int, scale: int, seed: int) -> Losses:
    return train(make, rule, base=base, total=total, scale=scale, seed=seed)


if __name__ == "__main__":
    table(__doc__, rows)
