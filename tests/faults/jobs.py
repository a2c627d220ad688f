"""What the processes of these tests train: the oracle's task, saved by the recipe of the elastic example."""

import contextlib
import hashlib
import os
import time

import oracle
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch
from examples.elastic_digits import load, log, save

ACCUMULATION = 2


def parts(*, total=oracle.TOTAL, parallel=True, **options):
    """All that has a state, and the module to call."""
    net = oracle.make_model()
    model = DDP(net) if parallel else net
    optimizer = torch.optim.SGD(net.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(total))
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, total=total, base_batch=4, micro_batch=4, **options
    )
    ema = anybatch.ModelEMA(net, 0.9, clock=controller.clock)
    named = {"model": net, "optimizer": optimizer, "scheduler": scheduler, "controller": controller, "ema": ema}
    return named, model


def step(named, model, *, rank=0, accumulation=ACCUMULATION):
    """One step of the oracle's: micro-batch `a` of rank `r` is number `r * accumulation + a`."""
    t = named["controller"].steps
    for a in range(accumulation):
        x, y = oracle.micro_batch(t, rank * accumulation + a)
        last = a == accumulation - 1 or not isinstance(model, DDP)
        with contextlib.nullcontext() if last else model.no_sync():
            (oracle.loss_fn(model(x), y) / accumulation).backward()
    named["optimizer"].step()
    named["optimizer"].zero_grad()


def states(named):
    return {name: part.state_dict() for name, part in named.items()}


def train(rank, folder, *, total=oracle.TOTAL, save_every=10, pause=0.0):
    """Go on from the folder's checkpoint to the end; rank 0 saves on the way."""
    parent = os.getppid()
    path = folder / "checkpoint.pt"
    saved = load(path) if path.exists() else None
    if saved and saved["controller"]["tau"] >= total:
        return
    named, model = parts(record=folder / "record.jsonl", total=total)
    for name, state in (saved or {}).items():
        named[name].load_state_dict(state)
    controller = named["controller"]
    saved_at = controller.tau
    log(folder, "start", rank=rank, pid=os.getpid(), step=controller.steps, ranks=dist.get_world_size())
    while not controller.done:
        step(named, model, rank=rank)
        time.sleep(pause)
        if os.getppid() != parent:
            os._exit(1)  # of a killed agent
        if controller.done or controller.clock.reached(saved_at + save_every):
            saved_at = controller.tau
            if controller.done:
                log(folder, "end", rank=rank, digest=digest(states(named)))
            if rank == 0:
                save(path, states(named))
                log(folder, "saved", step=controller.steps)
    controller.detach()


def digest(state):
    """Of all weights, averages and numbers."""
    found = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            found.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, inner in value.items():
                add(str(key))
                add(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                add(inner)
        else:
            found.update(repr(value).encode())

    add(state)
    return found.hexdigest()


def agent(folder, **options):
    """torchrun's agent with two workers, which it starts again after each death."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=100,
        monitor_interval=0.02,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        run_id="faults",
        start_method="fork",
    )
    elastic_launch(config, _worker)(folder, options)


def _worker(folder, options):
    rank = int(os.environ["RANK"])
    log(folder, "born", rank=rank, pid=os.getpid())
    dist.init_process_group("gloo")
    train(rank, folder, **options)
    dist.barrier()  # the other waits for the last save
    dist.destroy_process_group()
