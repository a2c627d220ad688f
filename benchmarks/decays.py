"""Decays on the clock against constant ones: final losses on the digits, for Adam and for SGD with momentum.

    python benchmarks/decays.py [--seeds 3]

Each row trains the demo's network from the same seeds with hyperparameters tuned at a base batch of 8, T_SI = 3000,
the learning rate decaying exponentially to 1 %.
"""

import argparse
import json
from statistics import fmean

import torch
from torch.nn.functional import cross_entropy

import anybatch
from anybatch._demo import LAST_RATE, digits, gradients, network

BASE, TOTAL, THETA = 8, 3000, 0.9

MAKERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.9, 0.99)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
}
RULES = {
    "AdaScale, decays on the clock": anybatch.AdaScale(decays="clock", smoothing=THETA),
    "AdaScale, decays constant": anybatch.AdaScale(decays="constant", smoothing=THETA),
    "square root, decays on the clock": anybatch.SquareRoot(decays="clock"),
    "square root, decays constant": anybatch.SquareRoot(decays="constant"),
}


def train(optimizer_name: str, rule: anybatch.Rule, scale: int, seed: int) -> tuple[float, float, int]:
    """Final training loss, test loss, and steps."""
    x, y, x_test, y_test = digits()
    net = network(seed)
    optimizer = MAKERS[optimizer_name](net.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / TOTAL))
    controller = anybatch.attach(optimizer, model=net, rule=rule, scheduler=schedule, total=TOTAL, scale="count")
    order = torch.Generator().manual_seed(seed)
    while not controller.done:
        rows = torch.randint(len(x), (scale, BASE), generator=order)
        controller.observe(gradients(net, x[rows], y[rows]))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return cross_entropy(net(x), y).item(), cross_entropy(net(x_test), y_test).item(), controller.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", help="write the rows here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'optimizer':10} {'rule':34} {'S':>4} {'steps':>6} {'train loss':>11} {'test loss':>10}")
    for name in MAKERS:
        for scale in (1, 8, 32):
            for label, rule in RULES.items():
                if (scale == 1 and label != "AdaScale, decays constant") or (name == "sgd" and "square" in label):
                    continue
                runs = [train(name, rule, scale, seed) for seed in range(options.seeds)]
                loss, test, steps = (fmean(column) for column in zip(*runs, strict=True))
                print(f"{name:10} {label:34} {scale:4} {steps:6.0f} {loss:11.4f} {test:10.4f}", flush=True)
                rows.append(
                    {"optimizer": name, "rule": label, "scale": scale, "steps": steps, "train": loss, "test": test}
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
