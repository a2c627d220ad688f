"""Only tell me my noise scale and critical batch, change nothing: an ordinary loop and one line more.

    python examples/noise_scale.py

`attach(..., scale=1)` measures and leaves the training as it is, bit for bit: at scale 1 every gain is 1. `base_batch`
is the batch that is used anyway, so that the noise scale comes in examples. One batch in two halves is enough to see
the noise; the averages of a run without a total look back over 1000 steps, which makes up for their being but two. At a
batch of the noise scale an example is worth about half of what it is in a small batch. The critical batch is that at
which steps times examples are fewest: `anybatch.forecast` has it from the record, over the whole run. With `per_layer`
the record has the noise of each layer too, which `anybatch report` draws.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import anybatch

BATCH = 16


def main() -> None:
    """Train as ever, measure, and print the noise scale along the run, the critical batch, and the layers' noise."""
    parser = argparse.ArgumentParser(description="Measure the gradient noise scale of an ordinary training.")
    parser.add_argument("--total", type=int, default=1000, help="steps of the run")
    parser.add_argument("--record", type=Path, help="where the steps are written to, for anybatch forecast and report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train(total=options.total, record=options.record or Path(folder, "run.jsonl"))))


def train(*, total: int, record: Path) -> dict[str, object]:
    """An ordinary run, and what was measured of it."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images).float() / 16, torch.as_tensor(labels)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    steps = anybatch.RunRecord(record, per_layer=5)  # new
    controller = anybatch.attach(optimizer, model=model, scale=1, base_batch=BATCH, record=steps)  # new

    found = []
    for step in range(1, total + 1):
        rows = torch.randint(len(x), (BATCH,))
        for half_x, half_y in anybatch.split((x[rows], y[rows]), 2):
            (cross_entropy(model(half_x), half_y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % max(1, total // 5) == 0:
            found.append((step, round(controller.noise_scale, 1)))
    controller.detach()

    critical = anybatch.forecast(record, [1]).critical
    layers = anybatch.read_record(record).per_layer()
    with torch.no_grad():
        accuracy = 100 * (model(x).argmax(1) == y).double().mean().item()
    return {
        "accuracy": accuracy,
        "steps": total,
        "noise_scale": found,
        "critical_batch": [round(BATCH * value, 1) for value in (critical.low, critical.value, critical.high)],
        "by_layer": {name: round(BATCH * moments.noise_scale, 1) for name, moments in layers.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
