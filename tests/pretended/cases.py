"""Trainings on the CPU and on a pretended GPU: the same weights, and what each step of the latter read and launched."""

import contextlib
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pretended.device import CUDA, Event, Machine, Pretended, Stream, installed  # before torch

import torch
from torch import nn
from torch.optim import adam
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import anybatch
from anybatch._controller import ending
from anybatch._gradients import norms

# Of the CPU too, for the weights that a GPU's must equal.
adam._get_capturable_supported_devices = lambda *_, **__: ["cpu", "cuda"]

STEPS, BATCH, WIDTH = 6, 4, 160  # 25,600 entries of a weight are large, biases small
SECOND = torch.device("cuda", 1)


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


def muon(model):
    weights = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(weights, lr=0.01), torch.optim.AdamW(rest, lr=1e-3, foreach=True)]


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        reads: of the host by anybatch in a step, once the training runs evenly; one for each residue of the step where
            these differ.
        plain: the same reads by torch itself, as those of a GradScaler.
    """

    optimizer: object = sgd
    attach: dict = field(default_factory=dict)
    reads: tuple = (1,)
    plain: int = 0
    model: object = Net
    steps: int = STEPS
    backwards: tuple = (3,)
    scaler: bool = False
    clip: bool = False
    overflow: bool = False  # the gradient of one parameter, in one micro-batch of the third step
    ema: dict | None = None
    record: int | None = None  # a record by layer at each so many steps; 0: without layers
    dtype: torch.dtype = torch.float32
    clear: dict = field(default_factory=dict)  # arguments of zero_grad
    streams: bool = False  # forward, backward and step on a stream each


ADAM = anybatch.AdaScale(metric="adam")
CASES = {
    "sgd": Case(),
    "nesterov": Case(partial(sgd, nesterov=True)),
    "adamw": Case(adamw),
    "fused": Case(fused),
    "capturable": Case(capturable),
    "tensor lr": Case(partial(capturable, tensor_lr=True)),
    "tensor lr and record": Case(partial(capturable, tensor_lr=True), record=0, reads=(2,)),
    "muon": Case(muon),
    "fixed rule": Case(attach={"rule": anybatch.Linear()}, reads=(0,)),
    "scaler": Case(scaler=True, clip=True, plain=1),
    "scaler, overflow": Case(scaler=True, overflow=True, plain=1),
    "fused, scaler": Case(fused, scaler=True, reads=(2,)),
    "fused, scaler, clip": Case(fused, scaler=True, clip=True, reads=(2,)),
    "fused, scaler, overflow": Case(fused, scaler=True, overflow=True, reads=(2,)),
    "fused, scaler, fixed rule": Case(fused, {"rule": anybatch.Linear()}, scaler=True, reads=(1,)),
    "average": Case(ema={}),
    "average, offloaded": Case(ema={"device": "cpu"}),
    "average of statistics": Case(ema={"average_statistics": True}),
    "Adam's metric": Case(adamw, {"rule": ADAM}, steps=14),
    "Adam's metric, fused": Case(fused, {"rule": ADAM}, steps=14),
    "record": Case(record=0),
    "by layer": Case(record=1, reads=(1,)),
    "consecutive": Case(attach={"rule": anybatch.AdaScale(consecutive=True)}, backwards=(1,)),
    "every second": Case(attach={"rule": anybatch.AdaScale(every=2, smoothing=0.99)}, reads=(1, 0)),
    "sum": Case(attach={"reduction": "sum"}),
    "varying": Case(backwards=(3, 2, 4), steps=9),
    "varying, clip": Case(backwards=(3, 2, 4), steps=9, clip=True),
    "not to none": Case(clear={"set_to_none": False}),
    "bfloat16": Case(dtype=torch.bfloat16, ema={}),
    "two devices": Case(model=Halves),
    "two devices, scaler": Case(model=Halves, scaler=True, plain=1),
    "two devices, by layer": Case(model=Halves, record=1),
    "two devices, Adam's metric": Case(adamw, {"rule": ADAM}, model=Halves, steps=14),
    "two devices, average, offloaded": Case(model=Halves, ema={"device": "cpu"}),
    "checkpointing": Case(model=partial(Net, checkpointing=False)),
    "re-entrant checkpointing": Case(model=partial(Net, checkpointing=True)),
    "streams": Case(streams=True, ema={"device": "cpu"}),
    "streams, scaler, by layer": Case(streams=True, scaler=True, record=1, plain=1),
    "streams, Adam's metric": Case(adamw, {"rule": ADAM}, streams=True, steps=14),
}


def train(case, machine=None):
    """The final weights and averages, the controller's numbers, and the log of each step."""
    torch.manual_seed(0)
    model = case.model().to(case.dtype)
    put = machine.put if machine else lambda tensor, device=None: tensor
    if machine and case.model is Halves:
        machine.move(model.first)
        machine.move(model.second, SECOND)
    elif machine:
        machine.move(model)
    optimizers = case.optimizer(model)
    options = dict(case.attach)
    scaler = None
    if case.scaler:
        scaler = options["grad_scaler"] = torch.amp.GradScaler("cuda" if machine else "cpu", init_scale=1024.0)
    if case.record is not None:
        path = Path(tempfile.mkdtemp(), "run.jsonl")
        options["record"] = anybatch.RunRecord(path, per_layer=case.record) if case.record else path
    controller = anybatch.attach(
        optimizers[0] if len(optimizers) == 1 else optimizers, model=model, base_batch=4, micro_batch=4, total=200, **options
    )
    average = None if case.ema is None else anybatch.ModelEMA(model, 0.9, clock=controller.clock, **case.ema)
    on = partial(_on, machine) if case.streams and machine else lambda _: contextlib.nullcontext()
    last = list(model.parameters())[-1]
    draws, logs = torch.Generator().manual_seed(0), []
    for step in range(case.steps):
        backwards = case.backwards[step % len(case.backwards)]
        for i in range(backwards):
            x, y = torch.randn(BATCH, 20, generator=draws), torch.randint(5, (BATCH,), generator=draws)
            with on(1):
                loss = cross_entropy(model(put(x.to(case.dtype))).float(), put(y, last.device)) / backwards
                if case.overflow and step == 2 and i == 1:
                    loss = loss + (last * torch.inf).sum()
                loss = loss if scaler is None else scaler.scale(loss)
            with on(2):
                loss.backward()
            del loss
        with on(3):
            for optimizer in optimizers:
                if case.clip:
                    if scaler:
                        scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
                if scaler:
                    scaler.step(optimizer)
                else:
                    optimizer.step()
            if scaler:
                scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad(**case.clear)
        logs.append(machine.take() if machine else None)
    weights = [*model.state_dict().values()]
    if average is not None:
        weights += average.state_dict()["averages"].values()
    numbers = controller.state_dict()
    controller.detach()
    ending._open.clear()  # the training ends before its schedule does
    return [w.entries if isinstance(w, Pretended) else w.detach() for w in weights], numbers, logs


@contextlib.contextmanager
def _on(machine, number):
    """The stream of this number on both devices."""
    with Stream(machine, CUDA, number).current(), Stream(machine, SECOND, number).current():
        yield


@contextlib.contextmanager
def as_on_a_device():
    """A context in which CPU tensors are measured by the operations of a device."""
    before, norms._on_host = norms._on_host, lambda _: False
    try:
        yield
    finally:
        norms._on_host = before


@dataclass(frozen=True)
class Found:
    """What a case showed.

    Args:
        weights: the largest difference of a weight or an average to the CPU's.
        numbers: the largest relative difference of a number of the controller.
        off: the largest relative difference of the controller's numbers to those of the CPU's own operations.
        own: for each step, the lines of anybatch that the host read at.
        reads: for each step, all reads of the host.
        skipped: number of skipped steps.
    """

    weights: float
    numbers: float
    off: float
    own: list
    reads: list
    hazards: list
    skipped: int


def found(case):
    """`Found` of one case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers = train(case)[1]
        with as_on_a_device():
            expected = train(case)
        machine = Machine()
        with installed(machine):
            got = train(case, machine)
    weights = [_apart(a, b) for a, b in zip(expected[0], got[0], strict=True)]
    logs = got[2]
    return Found(
        max(weights),
        _off(expected[1], got[1]),
        _off(numbers, got[1]),
        [log.own_reads for log in logs],
        [len(log.reads) for log in logs],
        sorted({line for log in logs for line in log.hazards}),
        got[1]["skipped"],
    )


def _off(expected, got):
    return max(abs(n - got[k]) / (abs(n) or 1) for k, n in expected.items() if isinstance(n, float | int))


def _apart(a, b):
    return float((a.double() - b.double()).abs().max().nan_to_num(torch.inf))
