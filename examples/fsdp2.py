"""FSDP2: the parameters in shards, and nothing else to say.

    torchrun --standalone --nproc-per-node=2 examples/fsdp2.py

`attach` is given the module that `fully_shard` was called on; the gain is that of the whole gradient, the same on every
rank. The checkpoint is one of torch.distributed.checkpoint; the controller's state, a few numbers, lies beside it.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import anybatch

BASE_BATCH = 8
BACKWARDS = 2  # of one base batch each, on every rank


def main() -> None:
    """Join the other ranks, train, and leave together."""
    parser = argparse.ArgumentParser(description="FSDP2 with a checkpoint.")
    parser.add_argument("--total", type=int, default=1000, help="base iterations of the run")
    parser.add_argument("--stop-at", type=float, help="save and leave at this tau")
    parser.add_argument("--checkpoint", type=Path, default=Path("fsdp2-checkpoint"), help="a folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # "nccl" on GPUs
    train(options)
    dist.barrier()
    dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """Load, train and save."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images).float() / 16, torch.as_tensor(labels)
    x, y, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.total)
    controller = anybatch.attach(
        optimizer,
        model=model,
        scheduler=scheduler,
        total=options.total,
        base_batch=BASE_BATCH,
        micro_batch=BASE_BATCH,
    )
    if options.checkpoint.exists():
        load(options.checkpoint, model, optimizer, {"scheduler": scheduler, "controller": controller})
    start = controller.tau

    draw = torch.Generator().manual_seed(1000 * rank + controller.steps)
    while not controller.done and not (options.stop_at and controller.clock.reached(options.stop_at)):
        for i in range(BACKWARDS):
            model.set_requires_gradient_sync(i == BACKWARDS - 1)  # the shards are reduced once a step
            rows = torch.randint(len(x), (BASE_BATCH,), generator=draw)
            (cross_entropy(model(x[rows]), y[rows]) / BACKWARDS).backward()
        optimizer.step()
        optimizer.zero_grad()

    save(options.checkpoint, model, optimizer, {"scheduler": scheduler, "controller": controller})
    with torch.no_grad():
        accuracy = 100 * (model(x_test).argmax(1) == y_test).double().mean().item()
    if rank == 0:
        numbers = {"ranks": ranks, "from": start, "tau": controller.tau, "steps": controller.steps}
        print(json.dumps({**numbers, "scale": controller.scale, "accuracy": accuracy}))
    controller.detach()


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: dict) -> None:
    """Shards by torch.distributed.checkpoint; what is the same on all ranks, by rank 0."""
    weights, moments = get_state_dict(model, optimizer)
    writer = dcp.FileSystemWriter(folder, overwrite=True)
    dcp.save({"model": weights, "optimizer": moments}, storage_writer=writer)
    if dist.get_rank() == 0:
        torch.save({name: other.state_dict() for name, other in others.items()}, folder / "others.pt")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: dict) -> None:
    """The reverse."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    for name, state in torch.load(folder / "others.pt", weights_only=True).items():
        others[name].load_state_dict(state)


if __name__ == "__main__":
    main()
