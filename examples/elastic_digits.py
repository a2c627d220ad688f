"""Elastic training of the handwritten digits: agents and workers may be killed, and may join, at any moment.

    python examples/elastic_digits.py                                              # one process
    torchrun --standalone --nproc-per-node=2 examples/elastic_digits.py            # two

and elastically, the same line for each agent, whenever it comes:

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=1:2 --nproc-per-node=1 --max-restarts=100 \
        --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:29400 --rdzv-id=digits \
        --rdzv-conf=is_host=false,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3 \
        examples/elastic_digits.py

Each rank takes the same 4 micro-batches of 8 images a step, so that the scale is 4 times the number of ranks. Nothing
else is said about it: learning rate, schedule and length of the run are those of the base batch of 8.

- `is_host=false`: the rendezvous' store is in none of the agents, so that any of them may die. A process that does
  nothing else holds it: `TCPStore("127.0.0.1", 29400, is_master=True, wait_for_workers=False)` of torch.distributed.
  Without this setting the first agent holds it, and when that one is killed the others follow.
- `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`: with torch 2.13 a late agent hangs without it.
- `keep_alive_max_attempt=3`: with 2, a slow heartbeat made two jobs of one, both writing to the same folder.
"""

import argparse
import json
import os
import sys
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import anybatch

BASE_BATCH = 8
BACKWARDS = 4  # of one base batch each, on every rank
LEARNING_RATE, MOMENTUM, LAST_RATE = 0.05, 0.9, 0.01


def main() -> None:
    """Join the other ranks, train, and leave together."""
    torch.set_num_threads(1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)  # without torchrun: one process
    dist.init_process_group("gloo")
    train(arguments())
    dist.barrier()  # the others wait for the last save
    dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """Restore, train, and save every few base iterations."""
    rank, ranks, agent = dist.get_rank(), dist.get_world_size(), os.getppid()
    x, y, x_test, y_test = digits()
    net = network(options.seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / options.total))
    path = options.folder / "checkpoint.pt"
    saved = load(path) if path.exists() else None
    if saved and saved["controller"]["tau"] >= options.total:
        print(f"{path} is of a finished run.")
        return
    model = DistributedDataParallel(net)
    controller = anybatch.attach(
        optimizer,
        model=model,
        scheduler=scheduler,
        total=options.total,
        base_batch=BASE_BATCH,
        micro_batch=BASE_BATCH,
        record=options.folder / "record.jsonl",
    )
    parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler, "controller": controller}
    for name, state in (saved or {}).items():
        parts[name].load_state_dict(state)
    saved_at = controller.tau
    now = {"tau": controller.tau, "step": controller.steps}
    log(options.folder, "start", rank=rank, ranks=ranks, **now, pid=os.getpid(), agent=agent)

    while not controller.done:
        for i, rows in enumerate(images(len(x), seed=options.seed, step=controller.steps, rank=rank, ranks=ranks)):
            with nullcontext() if i == BACKWARDS - 1 else model.no_sync():
                (cross_entropy(model(x[rows]), y[rows]) / BACKWARDS).backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(options.min_step_seconds)
        if os.getppid() != agent:  # nobody would stop this process when the others go on without it
            sys.exit("The agent of this worker is gone.")
        if rank == 0 and (controller.done or controller.clock.reached(saved_at + options.save_every)):
            if controller.done:
                with torch.no_grad():
                    accuracy = 100 * (net(x_test).argmax(1) == y_test).double().mean().item()
                log(options.folder, "end", tau=controller.tau, step=controller.steps, accuracy=accuracy)
            save(path, {name: part.state_dict() for name, part in parts.items()})
            saved_at = controller.tau
            log(options.folder, "saved", tau=controller.tau, step=controller.steps)
    controller.detach()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Elastic training of the digits.")
    parser.add_argument("--folder", type=Path, default=Path("elastic-digits"), help="checkpoint, record and log")
    parser.add_argument("--total", type=float, default=4000, help="base iterations of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data")
    parser.add_argument("--save-every", type=float, default=50, help="base iterations between two checkpoints")
    parser.add_argument("--min-step-seconds", type=float, default=0, help="a pause in each step")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    return options


def images(n: int, *, seed: int, step: int, rank: int, ranks: int) -> torch.Tensor:
    """The rows of a step on this rank, `[BACKWARDS, BASE_BATCH]`: made from the step's number, so never saved."""
    draw = torch.Generator().manual_seed(1_000_003 * seed + step)
    return torch.randint(n, (ranks, BACKWARDS, BASE_BATCH), generator=draw)[rank]


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The 1797 images, 75 % for training; pixels standardised."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in parts)
    mean, std = x_train.mean(), x_train.std()
    return ((x_train - mean) / std).float(), y_train, ((x_test - mean) / std).float(), y_test


def network(seed: int) -> nn.Sequential:
    """A multilayer perceptron, initialised from `seed`."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def save(path: Path, state: dict[str, object]) -> None:
    """Replace the checkpoint at once: a kill at any moment leaves the old one or the new one."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, if it is as it was written.

    torch.save writes a checksum of each tensor, which torch.load never looks at: it takes weights with flipped bits as
    they are, and reads memory that nobody has written where one bit calls a tensor a folder.
    """
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip() or next((part.filename for part in file.infolist() if part.external_attr), None)
    if damaged is not None:
        raise zipfile.BadZipFile(f"{path} is damaged at {damaged}: go on from an older checkpoint.")
    return dict(torch.load(path, weights_only=True))


def log(folder: Path, event: str, **fields: float) -> None:
    """Print a JSON line and append it to the folder's log, in one write: several processes share the file."""
    line = json.dumps({"event": event, "time": time.time(), **fields})
    print(line, flush=True)
    file = os.open(folder / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, f"{line}\n".encode())
    os.close(file)


if __name__ == "__main__":
    main()
