"""What several files of tests share: how many cases they draw, and the oracle's task, given to the library."""

import os
from contextlib import contextmanager

import oracle
import torch
import torch.distributed as dist

import anybatch


def times(short, long):
    """How many cases of a kind: `short` in `make test`, `long` in `make nightly`, which sets CASES=long."""
    return long if os.environ.get("CASES") == "long" else short


def attach_task(model, *, sample=1.0, **options):
    """The optimizer and schedule of `oracle.adascale` with a controller; a micro-batch is `sample` base batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(oracle.TOTAL))
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, total=oracle.TOTAL, base_batch=4 / sample, micro_batch=4, **options
    )
    return optimizer, controller


def step(optimizer, scaler=None):
    """A step, by the scaler where there is one."""
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def run_task(optimizer, controller, backward, *, steps, accumulation):
    """Gains and clock after each step; `backward(t, a)` does micro-batch `a` of step `t` on this rank."""
    gains, taus = [], []
    for t in range(steps):
        for a in range(accumulation):
            backward(t, a)
        optimizer.step()
        optimizer.zero_grad()
        gains.append(controller.gain)
        taus.append(controller.tau)
    return {"gains": gains, "taus": taus, "count": controller.count, "scale": controller.scale}


@contextmanager
def counted_all_reduces():
    """The sizes of the all-reduces that Python code calls inside."""
    calls, original = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield calls
    finally:
        dist.all_reduce = original


class Fails(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ZeroDivisionError
