"""The optimizers of the experiments, their schedules on the clock, and what each arm makes of a larger batch.

[Note: LARS] Each matrix moves along its gradient divided by that gradient's own norm, times its weights' norm (You et
al. 2017); the momentum is a sum of such steps, so it is normalised before, as RMSprop's is, and not after, as Muon's.
With variance sigma^2 and mean mu of a base batch's gradient, a batch of S divides by sqrt(sigma^2 / S + mu^2). To go as
far along mu as r base iterations, r the gain, the rate must grow by

    f = r sqrt(sigma^2 / S + mu^2) / sqrt(sigma^2 + mu^2) = r / sqrt(r) = sqrt(r)

for whatever sigma and mu: the exponent is 1/2, and the fixed rule where noise dominates the square root. The weight
decay is divided by the same norm, which falls by sqrt(r): it moves by r without a change of its own. The gain is that
of all layers together, while each has its own norm; and vectors (biases, gains) take plain SGD in these
implementations, for which r would be right: with one factor for all they are slower.
"""

from functools import partial
from math import cos, pi
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import anybatch
from recipes.ema.config import Arm, Config


def make_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """The optimizer at the base batch."""
    values: dict[str, Any] = {"lr": config.rate, "weight_decay": config.weight_decay}
    if config.optimizer == "lars":
        from pytorch_optimizer import LARS  # the one of this library alone: importing it takes a second

        values |= {"momentum": config.momentum, "trust_coefficient": config.trust}
        return LARS(model.parameters(), **values)
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **values)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](model.parameters(), **values)


def make_rule(how: Arm, config: Config) -> anybatch.Rule:
    """What the arm makes of a larger batch: of LARS `attach` knows nothing, so that its exponent is said."""
    if how.adascale:
        return anybatch.AdaScale(exponent=0.5 if config.optimizer == "lars" else None)
    return anybatch.Linear() if config.optimizer == "sgd" or how.linear else anybatch.SquareRoot()


def make_scheduler(optimizer: Optimizer, config: Config) -> LambdaLR | None:
    """A linear warm-up, then half a cosine down to 0, in base iterations; `None` for a constant rate."""
    if not (config.warmup or config.cosine):
        return None
    return LambdaLR(optimizer, partial(_factor, config))


def follow_weight_decay(optimizer: Optimizer, controller: anybatch.Controller, config: Config) -> None:
    """The weight decay from its first value to `config.final_weight_decay` by half a cosine on the clock."""
    if config.final_weight_decay is None:
        return
    first, last = config.weight_decay, config.final_weight_decay

    def move(_: float) -> None:
        done = min(controller.tau / config.total, 1.0)
        for group in optimizer.param_groups:
            group["weight_decay"] = last - (last - first) * (1 + cos(pi * done)) / 2

    controller.clock.subscribe(move)


def _factor(config: Config, iteration: int) -> float:
    if iteration < config.warmup:
        return (iteration + 1) / (config.warmup + 1)
    done = (iteration - config.warmup) / (config.total - config.warmup)
    return (1 + cos(pi * min(done, 1.0))) / 2 if config.cosine else 1.0
