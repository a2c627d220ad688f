"""The same micro-batches through DDP and FSDP2, and a loss scale that overflows on one rank."""

import contextlib
import warnings

import oracle
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch
from distributed.fsdp_workers import shard

STEPS = 3


def moments(model, *, accumulation, rank=0):
    """The averaged moments after three steps at a learning rate of 0; no rank's weights ever move."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = anybatch.attach(optimizer, model=model, scale="count", rule=anybatch.AdaScale(smoothing=0.5))
    for t in range(STEPS):
        for a in range(accumulation):
            x, y = oracle.micro_batch(t, rank * accumulation + a)
            local = isinstance(model, DDP) and a < accumulation - 1
            with model.no_sync() if local else contextlib.nullcontext():
                (oracle.loss_fn(model(x), y) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return controller.count, controller.variance, controller.sqnorm


def routes(rank, world):
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for a in (1, 2, 3):
        found["DDP", a] = moments(DDP(oracle.make_model()), accumulation=a, rank=rank)
        found["FSDP2", a] = moments(shard(oracle.make_model(), mesh=mesh), accumulation=a, rank=rank)
    return found


def overflow_on_one_rank(rank, world):
    """A GradScaler, and in the third step an infinite loss on rank 0 alone."""
    model = DDP(oracle.make_model(dtype=torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    controller = anybatch.attach(optimizer, model=model, scale="count", grad_scaler=scaler)
    for t in range(5):
        x, y = oracle.micro_batch(t, rank, dtype=torch.float32)
        loss = oracle.loss_fn(model(x), y) * (float("inf") if t == 2 and rank == 0 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return controller.steps, controller.skipped, controller.tau, scaler.get_scale(), finite


def uneven(rank, world, rule, divide):
    """Rank r has 3 + 2 r steps of two backwards. What the last rank saw, and the state of all at the end."""
    from torch.distributed.algorithms.join import Join

    ddp = DDP(oracle.make_model())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    controller = anybatch.attach(optimizer, model=ddp, scheduler=scheduler, scale="count", total=60, rule=rule)
    seen = []
    with Join([ddp, controller], divide_by_initial_world_size=divide):
        for t in range(3 + 2 * rank):
            for a in range(2):
                x, y = oracle.micro_batch(t, rank * 2 + a)
                with ddp.no_sync() if a == 0 else contextlib.nullcontext():
                    (oracle.loss_fn(ddp(x), y) / 2).backward()
            before = [p.detach().clone() for p in ddp.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            seen.append((controller.count, controller.gain, before))
    return seen, controller.state_dict(), scheduler.last_epoch, [p.detach() for p in ddp.parameters()]


def averaged(rank, world, sharded):
    """The model average after five steps, and whether `applied()` put the weights back."""
    warnings.simplefilter("ignore")
    model = shard(oracle.make_model(), mesh=init_device_mesh("cpu", (world,))) if sharded else DDP(oracle.make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = anybatch.attach(optimizer, model=model, scale="count", total=60)
    ema = anybatch.ModelEMA(model, 0.8, clock=controller.clock)
    for t in range(5):
        x, y = oracle.micro_batch(t, rank)
        oracle.loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole():
        return [p.full_tensor().detach() if sharded else p.detach().clone() for p in model.parameters()]

    before = whole()
    with ema.applied():
        average = whole()
    return average, all(map(torch.equal, before, whole())), not all(map(torch.equal, before, average))
