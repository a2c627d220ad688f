"""What it costs to measure some of the steps: `AdaScale(every=...)` on the digits, in a short and in a long run.

    python -m benchmarks.every [--seeds 5] [--json docs/overhead/every.json]

Mean and standard deviation over seeds. `p` is Welch's, one-sided, of a training loss no higher than with every step
measured: below .05 the loss is significantly higher.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import torch

import anybatch
from anybatch._demo import welch
from benchmarks.digits import train

BASE, SCALES = 8, (8, 32)
EVERY: tuple[int | Literal["auto"], ...] = (1, 4, 16, 64, "auto")
TOTALS = {"short": 4000, "long": 40_000}
MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
}


def row(optimizer: str, name: str, scale: int, every: int | Literal["auto"], seeds: int) -> dict[str, object]:
    """Steps, the share of them that was measured, and training losses of one cell."""
    rule, make = anybatch.AdaScale(every=every), MAKE[optimizer]
    runs, measured = [], 0
    for seed in range(seeds):
        lines: list[dict[str, float]] = []
        runs.append(train(make, rule, base=BASE, total=TOTALS[name], scale=scale, seed=seed, record=lines.append))
        measured += sum("anybatch/raw_variance" in line for line in lines)
    steps = [r[0] for r in runs]
    return {
        "optimizer": optimizer, "run": name, "scale": scale, "every": every, "steps": steps,
        "measured": measured / sum(steps), "losses": [r[1] for r in runs],
    }  # fmt: skip


def show(found: dict[str, object], before: Sequence[float]) -> None:
    """One line; `before` are the losses with every step measured."""
    steps, losses = found["steps"], found["losses"]
    assert isinstance(steps, list)
    assert isinstance(losses, list)
    p = welch([-loss for loss in losses], [-loss for loss in before]) if found["every"] != 1 else float("nan")
    spread = stdev(losses) if len(losses) > 1 else 0.0
    print(
        f"{found['optimizer']:6} {found['run']:6} {found['scale']:4} {found['every']:>6} {fmean(steps):7.0f} "
        f"{found['measured']:8.0%} {fmean(losses):9.5f} ± {spread:.5f} {p:6.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':6} {'run':6} {'S':>4} {'every':>6} {'steps':>7} {'measured':>8} {'train loss':>20} {'p':>6}")
    rows = []
    for optimizer, name, scale in product(MAKE, TOTALS, SCALES):
        before: Sequence[float] = ()
        for every in EVERY:
            rows.append(row(optimizer, name, scale, every, options.seeds))
            losses = rows[-1]["losses"]
            assert isinstance(losses, list)
            before = losses if every == 1 else before
            show(rows[-1], before)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
