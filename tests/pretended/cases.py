"""The trainings of `trainings.py`, and what their steps read. Without the pretence, so a test may import it."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import anybatch

STEPS, WIDTH = 6, 160  # 25,600 entries of a weight are large, biases small


class Net(nn.Module):
    """Large and small weights, a normalisation, and buffers."""

    def __init__(self, *, checkpointing=None):
        super().__init__()
        self.a, self.norm, self.statistics = nn.Linear(20, WIDTH), nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.checkpointing = checkpointing

    def middle(self, h):
        return self.b(h).relu()

    def forward(self, x):
        h = self.statistics(self.norm(self.a(x)).relu())
        if self.checkpointing is None:
            return self.c(self.middle(h))
        # The head is outside of the checkpoint. No state of a random generator: the pretence has none.
        again = checkpoint(self.middle, h, use_reentrant=self.checkpointing, preserve_rng_state=False)
        return self.c(again)


class Halves(nn.Module):
    """A model on two devices."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5))

    def forward(self, x):
        h = self.first(x).relu()
        return self.second(h.to(self.second[0].weight.device))


def sgd(model, **options):
    return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=True, **options)]


def adamw(model, *, tensor_lr=False, **options):
    made = torch.optim.AdamW(model.parameters(), lr=1e-3, **({"foreach": True} | options))
    for group in made.param_groups if tensor_lr else ():
        group["lr"] = torch.tensor(group["lr"], device=next(model.parameters()).device)
    return [made]


fused = partial(adamw, foreach=False, fused=True)
capturable = partial(adamw, capturable=True)


def two_fused(model):
    parameters = list(model.parameters())
    return [torch.optim.AdamW(part, lr=1e-3, fused=True) for part in (parameters[:4], parameters[4:])]


def muon(model):
    weights = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(weights, lr=0.01), torch.optim.AdamW(rest, lr=1e-3, foreach=True)]


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        reads: Reads of the host by anybatch, for each step; a shorter tuple is repeated.
        first: The same reads in the first step beyond these, by what is made once.
        plain: The same reads by torch itself in each step after the second, such as those of a GradScaler.
        skipped: Number of skipped steps.
    """

    optimizer: object = sgd
    attach: dict = field(default_factory=dict)
    reads: tuple = (1,)
    first: int = 0
    plain: tuple = (0,)
    skipped: int = 0
    model: object = Net
    steps: int = STEPS
    backwards: tuple = (3,)
    scaler: bool = False
    clip: bool = False
    overflow: bool = False  # the gradient of one parameter, in one micro-batch of the third step
    ema: dict | None = None
    record: int | None = None  # a record by layer at each so many steps; 0: without layers
    dtype: torch.dtype = torch.float32
    counts_on_device: bool = False  # the optimizer's counts of steps, where Adam's metric takes them
    clear: dict = field(default_factory=dict)  # arguments of zero_grad
    ddp: bool = False  # two ranks that have the same gradients, and all but a window's last backward in `no_sync`
    streams: bool = False  # forward, backward and step on a stream each


ADAM = anybatch.AdaScale(metric="adam")
FIXED = {"rule": anybatch.Linear(), "scale": 3.0, "base_batch": None, "micro_batch": None}
CASES = {
    "sgd": Case(),
    "nesterov": Case(partial(sgd, nesterov=True)),
    "adamw": Case(adamw),
    "fused": Case(fused),
    "capturable": Case(capturable),
    "tensor lr": Case(partial(capturable, tensor_lr=True), first=2),
    "tensor lr and record": Case(partial(capturable, tensor_lr=True), record=0, reads=(2,), first=2),
    "muon": Case(muon),
    "fixed rule": Case(attach={"rule": anybatch.Linear()}, reads=(0,), first=1),
    "scaler": Case(scaler=True, clip=True, plain=(1,)),
    "scaler, overflow": Case(scaler=True, overflow=True, reads=(1, 1, 0, 1, 1, 1), plain=(1,)),
    "fused, scaler": Case(fused, scaler=True),
    "fused, scaler, clip": Case(fused, scaler=True, clip=True),
    # The step after a skipped one reads whether each parameter is finite, once.
    "fused, scaler, overflow": Case(fused, scaler=True, overflow=True, reads=(1, 1, 1, 11, 1, 1), skipped=1),
    "fused, scaler, fixed rule": Case(fused, {"rule": anybatch.Linear()}, scaler=True, first=1),
    "two fused, scaler": Case(two_fused, scaler=True, reads=(2,)),
    "tensor lr, counting nothing": Case(partial(capturable, tensor_lr=True), FIXED, first=3),
    "average": Case(ema={}),
    "average, offloaded": Case(ema={"device": "cpu"}, first=10),
    "average of statistics": Case(ema={"average_statistics": True}),
    "Adam's metric": Case(adamw, {"rule": ADAM}, steps=14),
    "Adam's metric, fused": Case(fused, {"rule": ADAM}, steps=14, counts_on_device=True),
    "record": Case(record=0),
    "by layer": Case(record=1, first=1),
    "consecutive": Case(attach={"rule": anybatch.AdaScale(consecutive=True)}, backwards=(1,)),
    "every second": Case(attach={"rule": anybatch.AdaScale(every=2, smoothing=0.99)}, reads=(1, 0)),
    "sum": Case(attach={"reduction": "sum"}),
    "varying": Case(backwards=(3, 2, 4), steps=9),
    "varying, clip": Case(backwards=(3, 2, 4), steps=9, clip=True),
    "not to none": Case(clear={"set_to_none": False}),
    "bfloat16": Case(dtype=torch.bfloat16, ema={}),
    "two devices": Case(model=Halves),
    "two devices, scaler": Case(model=Halves, scaler=True, plain=(2,)),
    "two devices, by layer": Case(model=Halves, record=1, first=1),
    "two devices, Adam's metric": Case(adamw, {"rule": ADAM}, model=Halves, steps=14),
    "two devices, average, offloaded": Case(model=Halves, ema={"device": "cpu"}, first=6),
    "DDP": Case(ddp=True),
    "DDP, Adam's metric": Case(adamw, {"rule": ADAM}, ddp=True, steps=14),
    "DDP, by layer": Case(ddp=True, record=1, first=2),
    # The skip is one more read: over ranks the norms are reduced first.
    "DDP, fused, scaler": Case(fused, ddp=True, scaler=True, reads=(2,)),
    "DDP, every second": Case(attach={"rule": anybatch.AdaScale(every=2, smoothing=0.99)}, ddp=True, reads=(1, 0)),
    "checkpointing": Case(model=partial(Net, checkpointing=False)),
    "re-entrant checkpointing": Case(model=partial(Net, checkpointing=True)),
    "streams": Case(streams=True, ema={"device": "cpu"}, first=10),
    "streams, scaler, by layer": Case(streams=True, scaler=True, record=1, first=1, plain=(1,)),
    "streams, Adam's metric": Case(adamw, {"rule": ADAM}, streams=True, steps=14),
}
