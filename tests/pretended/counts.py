"""Launches that a controller adds to the steps of two networks, by the shapes of their parameters and without entries."""

from functools import partial

from pretended.device import Machine, installed  # before torch

import torch
from torch import nn

import anybatch
from anybatch._controller import ending

ACCUMULATION, STEPS = 4, 3


def gpt2():
    """GPT-2 124M: 148 tensors, 50 of them large."""
    block = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,)]
    return [(50257, 768), (1024, 768), *[*block, (768, 3072), (768,)] * 12, (768,), (768,)]


def resnet50():
    """ResNet-50: 161 tensors, 53 of them convolutions."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes = [(width, into, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            sizes += [(4 * width, into, 1, 1)] if block == 0 else []
            for size in sizes:
                shapes += [size, size[:1], size[:1]]
            into = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


NETWORKS = {"GPT-2 124M": gpt2, "ResNet-50": resnet50}


class Shapes(nn.Module):
    """Parameters of these shapes, each multiplied by a tensor like it."""

    def __init__(self, shapes, dtype):
        super().__init__()
        self.weights = nn.ParameterList(torch.empty(shape, device="meta", dtype=dtype) for shape in shapes)

    def forward(self, inputs):
        return torch.stack([(p * x).sum() for p, x in zip(self.weights, inputs)]).sum()


def launched(shapes, *, optimizer, attach, dtype=torch.float32, steps=STEPS):
    """The logs of each backward and then of `step()`, in the last of `steps`."""
    machine = Machine(meta=True)
    model = machine.move(Shapes(shapes, dtype))
    inputs = [machine.put(torch.empty(shape, device="meta", dtype=dtype)) for shape in shapes]
    made = optimizer(model.parameters())
    with installed(machine):
        controller = None
        if attach is not None:
            controller = anybatch.attach(made, model=model, scale="count", total=100, **attach)
        for _ in range(steps):
            parts = []
            for _ in range(ACCUMULATION):
                (model(inputs) / ACCUMULATION).backward()
                parts.append(machine.take())
            made.step()
            parts.append(machine.take())
            made.zero_grad()
        if controller is not None:
            controller.detach()
    ending._open.clear()
    return parts


def added(name, *, optimizer, attach, steps=STEPS, **options):
    """Launches added to each backward and to the step, and the host's reads in that step, by line."""
    run = partial(launched, NETWORKS[name](), optimizer=optimizer, steps=steps, **options)
    with_controller, plain = run(attach=attach), run(attach=None)
    more = [a.launches - b.launches for a, b in zip(with_controller, plain)]
    return more, [line for part in with_controller for line in part.own_reads]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=True)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=True)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


ADAM = {"rule": anybatch.AdaScale(metric="adam")}
OLD = 13  # steps: the averages of squares are old enough
ROWS = {
    "SGD": {"optimizer": sgd, "attach": {}},
    "AdamW": {"optimizer": adamw, "attach": {}},
    "fused AdamW": {"optimizer": fused, "attach": {}},
    "SGD, bfloat16": {"optimizer": sgd, "attach": {}, "dtype": torch.bfloat16},
    "a fixed rule": {"optimizer": sgd, "attach": {"rule": anybatch.Linear()}},
    "between measured steps": {"optimizer": sgd, "attach": {"rule": anybatch.AdaScale(every=9)}, "steps": 2},
    "AdamW, Adam's metric": {"optimizer": adamw, "attach": ADAM, "steps": OLD},
    "fused AdamW, Adam's metric": {"optimizer": fused, "attach": ADAM, "steps": OLD},
}
