"""Steps whose loss is a mean over all of their tokens, on one rank and on several."""

import contextlib

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch

START = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)
TRUE = torch.tensor([[1.0, 0.5, -0.5]], dtype=torch.float64)
LR = 0.05


def TASKS(seed, i, n):
    """`n` tokens of micro-batch `i`."""
    generator = torch.Generator().manual_seed(1000 * seed + i)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    return x, x @ TRUE.T + 0.5 * torch.randn(n, 1, dtype=torch.float64, generator=generator)


def attached(*, wrap=lambda model: model, lr=LR, **options):
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    model.weight.data.copy_(START)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    wrapped = wrap(model)
    controller = anybatch.attach(optimizer, model=wrapped, base_batch=2, micro_batch=2, **options)
    controller.micro_batch = 2  # two sequences, of which the model gets the tokens: no forward tells
    return wrapped, optimizer, controller


def plain_step(batches, *, scale):
    """Variance and sqnorm of a base batch, gain and weights after one step, by the formula of a weighted mean."""
    n = [len(x) for x, _ in batches]
    total = sum(n)
    each = []
    for x, y in batches:
        gradient = torch.zeros_like(START)
        for row, target in zip(x, y, strict=True):
            gradient += 2 * ((START * row).sum() - target) * row / total
        each.append(gradient)
    mean = torch.stack(each).sum(0)
    square = float(mean.square().sum())
    q = sum((k / total) ** 2 for k in n)
    of_the_mean = (sum(float(h.square().sum()) for h in each) - q * square) / (1 - q)
    variance, sqnorm = scale * of_the_mean, square - of_the_mean
    noise, signal = max(variance, 0.0), max(sqnorm, 0.0)
    gain = (noise + signal) / (noise / scale + signal)
    gain = gain**0.5 if gain > 1 else gain  # the first step's goes half of the way
    return variance, sqnorm, gain, START - LR * gain * mean


def steps(rank, lengths):
    """One step, two micro-batches a rank."""
    model, optimizer, controller = attached(wrap=DDP)
    for i in (0, 1):
        n = lengths[2 * rank + i]
        controller.weight = n
        x, y = TASKS(0, 2 * rank + i, n)
        with contextlib.nullcontext() if i else model.no_sync():
            ((model(x) - y).square().sum() / sum(lengths) * 2).backward()  # DDP divides by the ranks
    peek = controller.peek()
    optimizer.step()
    return {
        "peek": peek,
        "gain": controller.gain,
        "scale": controller.scale,
        "state": controller.state_dict(),
        "weights": model.module.weight.detach(),
    }


def one_sided(rank):
    """Weights on rank 0 alone; the error."""
    model, optimizer, controller = attached(wrap=DDP)
    for i in (0, 1):
        x, y = TASKS(0, 2 * rank + i, 4)
        if rank == 0:
            controller.weight = 4
        with contextlib.nullcontext() if i else model.no_sync():
            ((model(x) - y).square().sum() / 8).backward()
    try:
        optimizer.step()
    except anybatch.UsageError as error:
        return str(error)
    return ""


def sharded(rank, lengths):
    """A step as torchtitan has it: a loss over the tokens of all ranks, and FSDP2 told not to divide by them.

    First so, and then with the division by them and the loss times their number; what each came to.
    """
    found = []
    for divided in (False, True):
        model = fully_shard(nn.Linear(3, 1, bias=False, dtype=torch.float64))
        with torch.no_grad():
            full = torch.distributed.tensor.distribute_tensor(START, model.weight.device_mesh, model.weight.placements)
            model.weight.copy_(full)
        model.set_gradient_divide_factor(2.0 if divided else 1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        controller = anybatch.attach(optimizer, model=model, base_batch=2, micro_batch=2)
        controller.micro_batch = 2
        for i in (0, 1):
            n = lengths[2 * rank + i]
            controller.weight = n
            x, y = TASKS(0, 2 * rank + i, n)
            ((model(x) - y).square().sum() / sum(lengths) * (2 if divided else 1)).backward()
        try:
            optimizer.step()
            found.append((controller.gain, model.weight.full_tensor().detach()))
        except anybatch.UsageError as error:
            found.append(str(error))
    return found
