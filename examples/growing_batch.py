"""A batch that grows with the noise: small while all examples agree, large when only many of them tell something.

    python examples/growing_batch.py

`BatchController` says how many backwards the next step takes, such that an example of it is worth at least 80 % of one
at the base batch. The controller measures the noise and counts what was done; nothing else in the loop knows of it.
"""

import argparse
import json

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import anybatch

BASE_BATCH = 8


def main() -> None:
    """Train on the digits, and print the batch as it grew."""
    parser = argparse.ArgumentParser(description="A batch that grows with the noise.")
    parser.add_argument("--total", type=int, default=2000, help="base iterations of the run")
    total = parser.parse_args().total
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images).float() / 16, torch.as_tensor(labels)
    x, y, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, total=total, base_batch=BASE_BATCH, micro_batch=BASE_BATCH
    )
    batch = anybatch.BatchController(controller, efficiency=0.8, bounds=(2, 32))
    grown, seen = [(0, batch.accumulation * BASE_BATCH)], 0
    while not controller.done:
        n = batch.accumulation
        for _ in range(n):
            rows = torch.randint(len(x), (BASE_BATCH,))
            (cross_entropy(model(x[rows]), y[rows]) / n).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += n * BASE_BATCH
        if batch.accumulation * BASE_BATCH >= 1.5 * grown[-1][1]:
            grown.append((controller.clock.iteration, batch.accumulation * BASE_BATCH))
    with torch.no_grad():
        accuracy = 100 * (model(x_test).argmax(1) == y_test).double().mean().item()
    print(json.dumps({"accuracy": accuracy, "steps": controller.steps, "examples": seen, "batches": grown}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
