"""The launches that a controller adds to steps of networks of given shapes, without entries."""

import warnings
from functools import cache

import torch
from torch import nn

import anybatch
from anybatch._controller import ending
from anybatch._gradients import adam_metric
from pretended.device import Machine, installed
from pretended.rows import NETWORKS, OPTIMIZERS, of

ACCUMULATION, STEPS = 4, 2  # the second step is counted: it has buffers, and the number of backwards of the first


class Gradients(torch.autograd.Function):
    """A loss whose backward makes a new gradient for each parameter by one operation."""

    @staticmethod
    def forward(ctx, *parameters):
        ctx.save_for_backward(*parameters)
        return parameters[-1].sum()

    @staticmethod
    def backward(ctx, _):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class Shapes(nn.Module):
    """Parameters of these shapes."""

    def __init__(self, shapes, dtype):
        super().__init__()
        self.weights = nn.ParameterList(torch.empty(shape, device="meta", dtype=dtype) for shape in shapes)

    def forward(self):
        return Gradients.apply(*self.weights)


@cache
def plain(name, optimizer, dtype):
    """The launches of each backward and then of `step()`, without a controller."""
    return [part.launches for part in run(name, optimizer, dtype, None)]


def run(name, optimizer, dtype, attach):
    """The logs of each backward and then of `step()`, in the last of `STEPS`."""
    with torch.device("meta"):
        shapes = [p.shape for p in NETWORKS[name]().parameters()]
    machine = Machine(meta=True)
    model = machine.move(Shapes(shapes, dtype))
    made = OPTIMIZERS[optimizer](model.parameters())
    with installed(machine), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        controller = None
        if attach is not None:
            controller = anybatch.attach(made, model=model, scale="count", total=100_000, **attach)
        for _ in range(STEPS):
            parts = []
            for _ in range(ACCUMULATION):
                model().backward()
                parts.append(machine.take())
            made.step()
            parts.append(machine.take())
            made.zero_grad()
        if controller is not None:
            controller.detach()
    ending._open.clear()
    return parts


def found(key):
    """What the row and the network of `key` showed."""
    row, name = of(key)
    squares, adam_metric.SQUARES = adam_metric.SQUARES, 1
    try:
        parts = run(name, row.optimizer, row.dtype, row.attach)
    finally:
        adam_metric.SQUARES = squares
    bare = plain(name, row.optimizer, row.dtype)
    return {
        "added": [part.launches - before for part, before in zip(parts, bare, strict=True)],
        "own": [line for part in parts for line in part.own_reads],
    }
