"""Trainings on the CPU and on a pretended GPU: the same weights, and what each step of the latter read."""

import contextlib
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import adam
from torch.testing._internal.distributed.fake_pg import FakeStore

import anybatch
from anybatch._controller import ending
from anybatch._gradients import adam_metric, norms
from pretended.cases import Halves
from pretended.device import CUDA, Machine, Pretended, Stream, installed

# Of the CPU too, for the weights that a GPU's must equal.
adam._get_capturable_supported_devices = lambda *_, **__: ["cpu", "cuda"]

BATCH = 4
SECOND = torch.device("cuda", 1)


def train(case, machine=None):
    """The final weights and averages, the controller's numbers, and the log of each step."""
    with two_ranks() if case.ddp else contextlib.nullcontext():
        return _train(case, machine)


@contextlib.contextmanager
def two_ranks():
    """A group of two ranks, this one and another that has the same tensors."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with mock.patch.object(dist, "all_reduce", lambda tensor, **_: tensor.mul_(2)):
            yield
    finally:
        dist.destroy_process_group()


def in_ddp(model):
    """The model in DDP, whose buckets are the mean already; its log takes the time by CUDA events."""
    ddp = DistributedDataParallel(model, broadcast_buffers=False)

    def mean(_, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, mean)
    ddp.logger = mock.Mock()
    return ddp


def _train(case, machine):
    torch.manual_seed(0)
    model = case.model().to(case.dtype)
    put = machine.put if machine else lambda tensor, device=None: tensor
    if machine and case.model is Halves:
        machine.move(model.first)
        machine.move(model.second, SECOND)
    elif machine:
        machine.move(model)
    net = in_ddp(model) if case.ddp else model
    optimizers = case.optimizer(model)
    options = {"base_batch": 4, "micro_batch": 4, "total": 200} | case.attach
    scaler = None
    if case.scaler:
        scaler = options["grad_scaler"] = torch.amp.GradScaler("cuda" if machine else "cpu", init_scale=1024.0)
    if case.record is not None:
        path = Path(tempfile.mkdtemp(), "run.jsonl")
        options["record"] = anybatch.RunRecord(path, per_layer=case.record) if case.record else path
    controller = anybatch.attach(
        optimizers[0] if len(optimizers) == 1 else optimizers,
        model=net,
        **options,
    )
    average = None if case.ema is None else anybatch.ModelEMA(model, 0.9, clock=controller.clock, **case.ema)
    on = partial(_on, machine) if case.streams and machine else lambda _: contextlib.nullcontext()
    last = list(model.parameters())[-1]
    draws, logs = torch.Generator().manual_seed(0), []
    for step in range(case.steps):
        backwards = case.backwards[step % len(case.backwards)]
        for i in range(backwards):
            x, y = torch.randn(BATCH, 20, generator=draws), torch.randint(5, (BATCH,), generator=draws)
            alone = net.no_sync if case.ddp and i < backwards - 1 else contextlib.nullcontext
            with alone(), on(1):
                loss = cross_entropy(net(put(x.to(case.dtype))).float(), put(y, last.device)) / backwards
                if case.overflow and step == 2 and i == 1:
                    loss = loss + (last * torch.inf).sum()
                loss = loss if scaler is None else scaler.scale(loss)
            with alone(), on(2):
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
def as_on_a_device(*, counts):
    """A context in which CPU tensors are measured by the operations of a device; `counts`: those of steps too."""
    counted = mock.patch.object(adam_metric, "_on_device", return_value=True)
    with mock.patch.object(norms, "_on_host", return_value=False), counted if counts else contextlib.nullcontext():
        yield


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
        with as_on_a_device(counts=case.counts_on_device):
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
