"""A generator and a discriminator, each with a controller of its own and both on one clock, at any batch size.

    python examples/gan.py                       # at the batch it was tuned for
    python examples/gan.py --scale 8             # 8 times the batch, nothing else changed

The generator's loss goes through the discriminator. That backward is no training of the discriminator, so it runs in
`second.paused()`. The discriminator follows the generator's clock, so that both schedules are at one place and the run
has one end. The network that steps last in an iteration leads.
"""

import argparse
import json

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import anybatch

BASE_BATCH, TOTAL, LEARNING_RATE, BETAS = 16, 1500, 1e-3, (0.5, 0.9)


def main() -> None:
    """Train, and print what it came to."""
    parser = argparse.ArgumentParser(description="A small GAN at any batch size.")
    parser.add_argument("--scale", type=int, default=1, help="the batch, in base batches of 16 points")
    parser.add_argument("--total", type=int, default=TOTAL, help="base iterations of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data")
    options = parser.parse_args()
    print(json.dumps(train(**vars(options))))


def train(*, scale: int = 1, total: int = TOTAL, seed: int = 0) -> dict[str, float]:
    """One run; returns how many modes the generator reaches, its distance from them, and the steps."""
    torch.manual_seed(seed)
    generator, discriminator = perceptron(8, 2), perceptron(2, 1)
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, betas=BETAS) for net in (generator, discriminator)
    ]
    schedulers = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, total_iters=total) for each in optimizers]
    parts = max(2, scale)
    sizes = {"base_batch": BASE_BATCH, "micro_batch": BASE_BATCH * scale / parts}
    first = anybatch.attach(optimizers[0], model=generator, scheduler=schedulers[0], total=total, **sizes)
    second = anybatch.attach(optimizers[1], model=discriminator, scheduler=schedulers[1], total=first.clock, **sizes)
    part = BASE_BATCH * scale // parts

    while not first.done:
        for _ in range(parts):
            with second.together():  # two losses of one micro-batch
                (loss(discriminator(points(part)), 1.0) / parts).backward()
                (loss(discriminator(generator(torch.randn(part, 8)).detach()), 0.0) / parts).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        for _ in range(parts):
            with second.paused():  # the discriminator's gradients of this loss are not used
                (loss(discriminator(generator(torch.randn(part, 8))), 1.0) / parts).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        optimizers[1].zero_grad()

    with torch.no_grad():
        near, mode = torch.cdist(generator(torch.randn(2000, 8)), MODES).min(1)
    return {
        "modes": int((torch.bincount(mode[near < 0.5], minlength=8) > 20).sum()),
        "distance": near.mean().item(),
        "steps": first.steps,
        "gain": first.tau / first.steps,
        "rates": [optimizer.param_groups[0]["lr"] for optimizer in optimizers],
    }


ANGLES = torch.arange(8) * torch.pi / 4
MODES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def points(n: int) -> Tensor:
    """`n` points of eight Gaussians on a circle."""
    return MODES[torch.randint(8, (n,))] + 0.1 * torch.randn(n, 2)


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    """A network of two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


def loss(logits: Tensor, target: float) -> Tensor:
    """The cross entropy against one target for all."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
