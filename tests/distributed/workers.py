"""What the processes of the distributed tests do. In a module of its own, so that spawned processes can import it."""

import contextlib

import oracle
import torch
import torch.distributed as dist
from common import attach_task, counted_all_reduces, run_task
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch


def train(
    rank,
    *,
    accumulation,
    steps=13,
    sample=1.0,
    dtype=torch.float64,
    hook=None,
    compiled=None,
    **ddp_options,
):
    """The task of the oracle; micro-batch `a` of rank `r` is number `r * accumulation + a`."""
    model = oracle.make_model(dtype=dtype)
    if compiled == "before":
        model.compile(backend="aot_eager")
    model = DDP(model, **ddp_options)
    if compiled == "after":
        model.compile(backend="aot_eager")
    if hook is not None:
        model.register_comm_hook(None, hook)
    optimizer, controller = attach_task(model, sample=sample)

    def backward(t, a):
        x, y = oracle.micro_batch(t, rank * accumulation + a, dtype=dtype)
        with contextlib.nullcontext() if a == accumulation - 1 else model.no_sync():
            (oracle.loss_fn(model(x), y) / accumulation).backward()

    result = run_task(optimizer, controller, backward, steps=steps, accumulation=accumulation)
    return {**result, "parameters": [p.detach() for p in model.parameters()]}


def parity(rank, world):
    """Every way of the oracle's task through DDP."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook

    results = {f"accumulation {a}": train(rank, accumulation=a) for a in (1, 2, 3)}
    results["S != N"] = train(rank, accumulation=2, sample=0.25)
    results["bucket views"] = train(rank, accumulation=2, gradient_as_bucket_view=True)
    results["static graph"] = train(rank, accumulation=1, static_graph=True)
    results["many buckets"] = train(rank, accumulation=2, bucket_cap_mb=1e-4)
    results["find unused"] = train(rank, accumulation=2, find_unused_parameters=True)
    results["own hook"] = train(rank, accumulation=2, hook=allreduce_hook)
    for compiled in ("before", "after"):
        results[f"compiled {compiled} DDP"] = train(rank, accumulation=2, compiled=compiled)
    results["float32"] = train(rank, accumulation=2, dtype=torch.float32)
    results["fp16 hook"] = train(rank, accumulation=1, dtype=torch.float32, hook=fp16_compress_hook)
    return results


def collectives_per_step(rank, world):
    """How many all-reduces one step adds to DDP's own."""
    model = DDP(oracle.make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anybatch.attach(optimizer, model=model, scale="count")
    with counted_all_reduces() as calls:
        for _ in range(3):
            x, y = oracle.micro_batch(0, rank)
            oracle.loss_fn(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return calls


class Branches(nn.Module):
    """A trunk, a frozen layer, and two heads of which a backward uses one: unused and frozen parameters."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6, dtype=torch.float64).requires_grad_(False)
        self.heads = nn.ModuleList(nn.Linear(6, 3, dtype=torch.float64) for _ in range(2))

    def forward(self, x, head):
        return self.heads[head](self.frozen(x))


def unused_and_frozen(rank, world):
    """Ranks and micro-batches use different heads; returns moments and those of a plain loop over all gradients."""
    torch.manual_seed(0)
    net = Branches()
    model = DDP(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
    controller = anybatch.attach(optimizer, model=model, scale="count", rule=anybatch.AdaScale(smoothing=0.0))
    for a in range(2):
        x, y = oracle.micro_batch(0, 2 * rank + a)
        with contextlib.nullcontext() if a == 1 else model.no_sync():
            (oracle.loss_fn(model(x, (rank + a) % 2), y) / 2).backward()
    optimizer.step()
    grads = []
    for r in range(world):
        for a in range(2):
            x, y = oracle.micro_batch(0, 2 * r + a)
            g = torch.autograd.grad(
                oracle.loss_fn(net(x, (r + a) % 2), y), list(net.heads.parameters()), allow_unused=True
            )
            grads.append([torch.zeros_like(p) if d is None else d for d, p in zip(g, net.heads.parameters())])
    n = len(grads)
    mean = [sum(g[k] for g in grads) / n for k in range(len(grads[0]))]
    deviation = sum(oracle.norm2([a - b for a, b in zip(g, mean)]) for g in grads) / (n - 1)
    return controller.variance, controller.sqnorm, deviation, oracle.norm2(mean) - deviation / n


def faults(rank, world):
    """What goes wrong on one rank must be the same error, or the same skip, on all."""
    outcome = {}

    def attached(**options):
        model = DDP(oracle.make_model())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, anybatch.attach(optimizer, model=model, **options)

    def step(model, optimizer, index=0, backwards=1, factor=1.0):
        for a in range(backwards):
            x, y = oracle.micro_batch(index, rank)
            with contextlib.nullcontext() if a == backwards - 1 else model.no_sync():
                (oracle.loss_fn(model(x), y) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, controller = attached(scale="count")
    step(model, optimizer)
    tau = controller.tau
    state = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, 1, factor=float("inf") if rank == 0 else 1.0)
    outcome["skipped"] = (controller.skipped, controller.steps, controller.tau == tau, controller.variance)
    with torch.no_grad():
        for p, s in zip(model.parameters(), state):
            p.copy_(s)
    step(model, optimizer, 2)
    outcome["after the skip"] = (controller.steps, controller.gain)

    for name, options in {"AdaScale": {}, "Linear": {"rule": anybatch.Linear()}}.items():
        model, optimizer, controller = attached(scale="count", **options)
        try:
            step(model, optimizer, backwards=1 + rank)
        except anybatch.UsageError as error:
            outcome[f"counts differ, {name}"] = str(error)

    model, optimizer, controller = attached(scale="count")
    with model.no_sync():
        oracle.loss_fn(model(oracle.micro_batch(0, rank)[0]), 0).backward()
    try:
        optimizer.step()
    except anybatch.UsageError as error:
        outcome["never synchronised"] = str(error)

    plain = oracle.make_model()
    try:
        anybatch.attach(torch.optim.SGD(plain.parameters(), lr=0.1), model=plain, scale=2)
    except anybatch.UsageError as error:
        outcome["no DDP"] = str(error)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=plain, scale="count", process_group=alone)
    for a in range(2):
        (oracle.loss_fn(plain(oracle.micro_batch(0, a)[0]), 0) / 2).backward()
    optimizer.step()
    outcome["alone"] = controller.count

    model, optimizer, controller = attached(scale="count", rule=anybatch.Linear())
    step(model, optimizer, backwards=3)
    outcome["fixed rule"] = (controller.scale, controller.tau, controller.lr_factor)
    return outcome


def subgroup(rank, world):
    """DDP over pairs of ranks: the controller reduces over DDP's own group."""
    groups = [dist.new_group([2 * i, 2 * i + 1]) for i in range(world // 2)]
    model = DDP(oracle.make_model(), process_group=groups[rank // 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = anybatch.attach(optimizer, model=model, scale="count")
    x, y = oracle.micro_batch(0, rank)
    oracle.loss_fn(model(x), y).backward()
    optimizer.step()
    return controller.count, controller.variance


def followed_join(rank, world):
    """What Join says of something that follows the clock, and whether it works again without."""
    ddp = DDP(oracle.make_model())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    controller = anybatch.attach(optimizer, model=ddp, scheduler=scheduler, scale="count", total=60)
    refused = []
    for follower in (
        anybatch.ModelEMA(ddp, 0.8, clock=controller.clock),
        anybatch.BatchController(controller, bounds=(1, 8)),
    ):
        try:
            Join([ddp, controller])
        except anybatch.UnsupportedError as error:
            refused.append(str(error))
        follower.stop()
    with Join([ddp, controller]):
        for t in range(1 + rank):
            x, y = oracle.micro_batch(t, rank)
            oracle.loss_fn(ddp(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return refused, controller.steps, controller.tau


def record_of_one(rank, world, path):
    """The path is given on rank 0 alone, and every rank logs."""
    model = DDP(oracle.make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count", record=path if rank == 0 else None)
    controller.log(accuracy=0.5 + rank)
    controller.detach()


def record(rank, world, path):
    """All ranks are given the same path; one of them writes."""
    model = DDP(oracle.make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, scale="count", record=path)
    for t in range(5):
        x, y = oracle.micro_batch(t, rank)
        oracle.loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.detach()
