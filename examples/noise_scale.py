"""The gradient noise scale of a training that anybatch does not change: which batch sizes would still pay?

    python examples/noise_scale.py

`attach(..., scale=1)` measures and leaves the training as it is, bit for bit: at scale 1 every gain is 1. One batch in
two halves is enough to see the noise; a long memory, here of 200 steps, makes up for their being but two. At a batch of
the noise scale an example is worth about half of what it is in a small batch: far below it a larger batch costs hardly
more examples, far above it it saves hardly any steps. The record of such a run is all that `anybatch forecast` needs.
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import anybatch

BATCH = 16


def main() -> None:
    """Train as ever, measure, and print the noise scale along the run."""
    parser = argparse.ArgumentParser(description="Measure the gradient noise scale of an ordinary training.")
    parser.add_argument("--total", type=int, default=1000, help="steps of the run")
    parser.add_argument("--record", type=Path, help="where the steps are written to, for anybatch forecast and report")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images).float() / 16, torch.as_tensor(labels)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.total)
    controller = anybatch.attach(
        optimizer,
        model=model,
        rule=anybatch.AdaScale(smoothing=0.995),
        scheduler=scheduler,
        total=options.total,
        scale=1,
        record=options.record,
    )
    found = []
    while not controller.done:
        rows = torch.randint(len(x), (BATCH,))
        for half_x, half_y in anybatch.split((x[rows], y[rows]), 2):
            (cross_entropy(model(half_x), half_y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller.steps % max(1, options.total // 5) == 0:
            found.append(
                (controller.steps, round(controller.noise_scale * BATCH, 1))
            )  # of batches; times BATCH, examples
    with torch.no_grad():
        accuracy = 100 * (model(x).argmax(1) == y).double().mean().item()
    print(json.dumps({"accuracy": accuracy, "steps": controller.steps, "noise_scale": found}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
