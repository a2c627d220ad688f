"""What it costs to measure each k-th step alone: `AdaScale(every=k)` on the digits, in a short and in a long run.

    python -m benchmarks.every [--seeds 5] [--json docs/overhead/every.json]

Mean and standard deviation over seeds. `p` is Welch's, one-sided, of a training loss no higher than with every step
measured: below .05 the loss is significantly higher.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch

import anybatch
from anybatch._demo import welch
from benchmarks.digits import train

BASE, SCALES, EVERY = 8, (8, 32), (1, 4, 16, 64)
TOTALS = {"short": 4000, "long": 40_000}
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9)


def row(name: str, scale: int, every: int, seeds: int) -> dict[str, object]:
    """Steps and training losses of one cell."""
    rule = anybatch.AdaScale(every=every)
    runs = [train(SGD, rule, base=BASE, total=TOTALS[name], scale=scale, seed=seed) for seed in range(seeds)]
    return {"run": name, "scale": scale, "every": every, "steps": [r[0] for r in runs], "losses": [r[1] for r in runs]}


def show(found: dict[str, object], before: Sequence[float]) -> None:
    """One line; `before` are the losses with every step measured."""
    steps, losses = found["steps"], found["losses"]
    assert isinstance(steps, list)
    assert isinstance(losses, list)
    p = welch([-loss for loss in losses], [-loss for loss in before]) if found["every"] != 1 else float("nan")
    spread = stdev(losses) if len(losses) > 1 else 0.0
    print(
        f"{found['run']:6} {found['scale']:4} {found['every']:6} {fmean(steps):7.0f} {fmean(losses):9.5f} ± "
        f"{spread:.5f} {p:6.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'run':6} {'S':>4} {'every':>6} {'steps':>7} {'train loss':>20} {'p':>6}")
    rows = []
    for name in TOTALS:
        for scale in SCALES:
            before: Sequence[float] = ()
            for every in EVERY:
                rows.append(row(name, scale, every, options.seeds))
                losses = rows[-1]["losses"]
                assert isinstance(losses, list)
                before = losses if every == 1 else before
                show(rows[-1], before)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
