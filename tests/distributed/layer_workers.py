"""Layers that are looked at under DDP and FSDP2."""

import contextlib
import tempfile
import warnings
from pathlib import Path

import oracle
import torch
from common import counted_all_reduces
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch
from distributed.fsdp_workers import shard

STEPS, EVERY = 4, 2


def layered(every, rank):
    """A record by layer on the first rank, which decides for all."""
    return [anybatch.RunRecord(Path(tempfile.mkdtemp()) / "run.jsonl", per_layer=every)] if rank == 0 else []


def looks(model, *, accumulation, rank=0, scaler=None):
    """The raw moments of each step, by layer too where it is looked at, and the sizes of all all-reduces."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    lines = []
    with counted_all_reduces() as sizes:
        controller = anybatch.attach(
            optimizer, model=model, scale="count", record=[*layered(EVERY, rank), lines.append], grad_scaler=scaler
        )
        for t in range(STEPS):
            for a in range(accumulation):
                x, y = oracle.micro_batch(t, rank * accumulation + a)
                local = isinstance(model, DDP) and a < accumulation - 1
                with model.no_sync() if local else contextlib.nullcontext():
                    loss = oracle.loss_fn(model(x), y) / accumulation
                    (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step()
            optimizer.zero_grad()
    controller.detach()
    found = [{name: value for name, value in line.items() if "per_layer" in name or "/raw_" in name} for line in lines]
    return found, sizes


def routes(rank, world):
    """What every engine finds at every accumulation, and what is refused."""
    warnings.simplefilter("ignore")
    found = {}
    for a in (1, 3):
        found["DDP", a] = looks(DDP(oracle.make_model()), accumulation=a, rank=rank)
        mesh = init_device_mesh("cpu", (world,))
        found["FSDP2", a] = looks(shard(oracle.make_model(), mesh=mesh), accumulation=a, rank=rank)
    found["compiled", 1] = looks(torch.compile(DDP(oracle.make_model()), backend="eager"), accumulation=1, rank=rank)
    return found, refused(rank)


def refused(rank):
    """The errors of a record that the first rank has not, and of one by layer in Join."""
    model = DDP(oracle.make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = []
    try:
        anybatch.attach(optimizer, model=model, scale="count", record=layered(1, 1 - rank))
    except anybatch.UsageError as error:
        told.append(str(error))
    controller = anybatch.attach(optimizer, model=model, scale="count", record=layered(1, rank))
    try:
        with Join([model, controller]):
            pass
    except anybatch.UnsupportedError as error:
        told.append(str(error))
    return told
