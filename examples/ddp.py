"""DistributedDataParallel with a checkpoint, a resume on any number of ranks, and a model average.

    torchrun --standalone --nproc-per-node=2 examples/ddp.py --stop-at 500      # two ranks, stopped half-way
    torchrun --standalone --nproc-per-node=4 examples/ddp.py                    # goes on, on four
    torchrun --standalone --nproc-per-node=2 examples/ddp.py --accumulate 16    # 32 times the batch

Each rank takes micro-batches of 8 images, one a step or as many as it accumulates, so the scale is the ranks times
these; nothing else is said of it.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import anybatch

BASE_BATCH = 8


def main() -> None:
    """Join the other ranks, train, and leave together."""
    parser = argparse.ArgumentParser(description="DDP with a checkpoint and a model average.")
    parser.add_argument("--total", type=int, default=1000, help="base iterations of the run")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of each rank in a step")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data")
    parser.add_argument("--stop-at", type=float, help="save and leave at this tau")
    parser.add_argument("--checkpoint", type=Path, default=Path("ddp.pt"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # "nccl" on GPUs, with model and data on torch.device("cuda", LOCAL_RANK)
    train(options)
    dist.barrier()
    dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """Load, train and save."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images).float() / 16, torch.as_tensor(labels)
    x, y, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]
    torch.manual_seed(options.seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.total)
    model = DistributedDataParallel(net)
    controller = anybatch.attach(
        optimizer,
        model=model,
        scheduler=scheduler,
        total=options.total,
        base_batch=BASE_BATCH,
        micro_batch=BASE_BATCH,
        examples=len(x),
    )
    ema = anybatch.ModelEMA(net, decay=0.99, clock=controller.clock)
    states = {"model": net, "optimizer": optimizer, "scheduler": scheduler, "controller": controller, "ema": ema}
    if options.checkpoint.exists():
        for name, state in torch.load(options.checkpoint, weights_only=True).items():
            states[name].load_state_dict(state)
    start = controller.tau

    parts = options.accumulate
    batches = own_rows(
        len(x), rank=rank, ranks=ranks, size=parts * BASE_BATCH, first=controller.steps, seed=options.seed
    )
    while not controller.done and not (options.stop_at and controller.clock.reached(options.stop_at)):
        for i, rows in enumerate(next(batches).chunk(parts)):
            with nullcontext() if i == parts - 1 else model.no_sync():  # the ranks meet in the last one
                (cross_entropy(model(x[rows]), y[rows]) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()

    if rank == 0:
        torch.save({name: part.state_dict() for name, part in states.items()}, options.checkpoint)
        with torch.no_grad(), ema.applied():
            accuracy = 100 * (net(x_test).argmax(1) == y_test).double().mean().item()
        numbers = {"ranks": ranks, "from": start, "tau": controller.tau, "steps": controller.steps}
        print(json.dumps({**numbers, "scale": controller.scale, "accuracy": accuracy}))
    controller.detach()


def own_rows(n: int, *, rank: int, ranks: int, size: int, first: int, seed: int) -> Iterator[torch.Tensor]:
    """This rank's rows of each step: every pass in an order of its own, the same on all ranks, each image once."""
    per_pass = n // (size * ranks)
    step = first
    while True:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(10_000 * seed + step // per_pass))
        at = (step % per_pass * ranks + rank) * size
        yield order[at : at + size]
        step += 1


if __name__ == "__main__":
    main()
