"""Launches added by a controller, for the shapes of two networks. Without the pretence, so a test may import it."""

from dataclasses import dataclass, field

import torch

import anybatch
from benchmarks.gpu_models import GPT2, ResNet50

NETWORKS = {"GPT-2 124M": GPT2, "ResNet-50": ResNet50}


@dataclass(frozen=True)
class Row:
    """One setting.

    Args:
        added: For each network, the launches added to each of the four backwards and to the step.
        reads: Reads of the host in that step.
    """

    added: dict
    optimizer: str = "sgd"
    attach: dict = field(default_factory=dict)
    reads: int = 1
    dtype: torch.dtype = torch.float32


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


ADAM = {"rule": anybatch.AdaScale(metric="adam")}
GPT, RESNET = NETWORKS
ROWS = {
    "SGD": Row({GPT: (155, 57, 57, 70, 3), RESNET: (165, 56, 56, 65, 3)}),
    "AdamW": Row({GPT: (155, 57, 57, 70, 3)}, "adamw"),
    # Its step counts are on the device: the two operations that put them on the clock are two launches each.
    "fused AdamW": Row({GPT: (155, 57, 57, 70, 7)}, "fused"),
    "SGD, bfloat16": Row({GPT: (159, 61, 61, 74, 3)}, dtype=torch.bfloat16),
    "a fixed rule": Row({RESNET: (0, 0, 0, 0, 0)}, attach={"rule": anybatch.Linear()}, reads=0),
    "between measured steps": Row({RESNET: (0, 0, 0, 0, 0)}, attach={"rule": anybatch.AdaScale(every=9)}, reads=0),
    "AdamW, Adam's metric": Row({GPT: (419, 321, 321, 598, 6)}, "adamw", ADAM),
    "fused AdamW, Adam's metric": Row({GPT: (477, 373, 373, 702, 10)}, "fused", ADAM),
}
KEYS = [f"{name} | {network}" for name, row in ROWS.items() for network in row.added]


def of(key):
    """The row and the network of one of `KEYS`."""
    row, name = key.split(" | ")
    return ROWS[row], name
