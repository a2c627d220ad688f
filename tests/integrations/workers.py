"""What each process of a test in this folder does."""

import itertools
from contextlib import nullcontext

import oracle
import torch
from torch.nn.parallel import DistributedDataParallel

import anybatch
from integrations import task


def plain(rank, world):
    """The plain loop under DDP, without clipping and with it."""
    return [_plain(rank, world, clip) for clip in (None, 0.5)]


def _plain(rank, world, clip):
    model = DistributedDataParallel(oracle.make_model())
    optimizer = task.optimizer_of(model)
    controller = anybatch.attach(
        optimizer, model=model, scheduler=task.scheduler_of(optimizer), total=task.TOTAL, base_batch=task.SIZE,
        micro_batch=task.SIZE,
    )  # fmt: skip
    trace, batches, length = task.Trace(controller), iter(task.loader(rank, world)), task.MICRO_BATCHES // world
    while not controller.done:
        for i, (x, y) in enumerate(itertools.islice(batches, length), 1):
            with nullcontext() if i == length else model.no_sync():
                (oracle.loss_fn(model(x), y) / length).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return task.outcome(trace, model, optimizer)
