"""Ray Train: plain `attach` inside of the function that each worker runs, and a checkpoint that Ray keeps.

    python examples/ray_train.py --workers 1 2 --stop-at 300    # one worker, stopped half-way; goes on, on two

Each worker takes one micro-batch of 8 images a step, so the scale is the number of workers. The checkpoint holds model,
optimizer and scheduler; the controller's numbers travel in the optimizer's.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer, get_device, prepare_model
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import anybatch

BASE_BATCH = 8


def worker(config: dict[str, Any]) -> None:
    """Train on one worker; Ray has made the process group."""
    torch.set_num_threads(1)
    rank = train.get_context().get_world_rank()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images).float() / 16, torch.as_tensor(labels)
    x, y, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model = prepare_model(net)  # DistributedDataParallel, where there are several workers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config["total"])
    controller = anybatch.attach(
        optimizer,
        model=model,
        scheduler=scheduler,
        total=config["total"],
        base_batch=BASE_BATCH,
        micro_batch=BASE_BATCH,
        examples=len(x),
    )
    parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
    if config["resume"]:
        saved = torch.load(Path(config["resume"]) / "parts.pt", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    resumed, device = controller.tau, get_device()
    draw = torch.Generator().manual_seed(1000 * controller.steps + rank)
    until = config["stop_at"] or config["total"]
    while not controller.clock.reached(until):
        chosen = torch.randint(len(x), (BASE_BATCH,), generator=draw)
        cross_entropy(model(x[chosen].to(device)), y[chosen].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        accuracy = (net(x_test.to(device)).argmax(1).cpu() == y_test).float().mean().item()
    result = {"resumed": resumed, "tau": controller.tau, "gain": controller.gain, "accuracy": 100 * accuracy}
    with tempfile.TemporaryDirectory() as folder:
        torch.save({name: part.state_dict() for name, part in parts.items()}, Path(folder) / "parts.pt")
        kept = train.Checkpoint.from_directory(folder) if rank == 0 else None
        train.report({**result, "steps": controller.steps, "scale": controller.scale}, checkpoint=kept)


def main() -> None:
    """Start Ray on this machine, run the workers, and print what came of it."""
    parser = argparse.ArgumentParser(description="Ray Train with plain attach, stopped and resumed on other workers.")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="of each start, one after the other")
    parser.add_argument("--total", type=int, default=600, help="base iterations of the run")
    parser.add_argument("--stop-at", type=float, help="save and leave at this tau; of several starts all but the last")
    parser.add_argument("--folder", type=Path, default=Path("ray"), help="where the checkpoint is kept")
    options = parser.parse_args()
    ray.init(num_cpus=max(options.workers), include_dashboard=False, log_to_driver=False)
    for i, workers in enumerate(options.workers, 1):
        stop_at = None if 1 < i == len(options.workers) else options.stop_at
        print(json.dumps(start(workers, folder=options.folder.resolve(), total=options.total, stop_at=stop_at)))
    ray.shutdown()


def start(workers: int, *, folder: Path, total: int, stop_at: float | None) -> dict[str, Any]:
    """Train from the newest checkpoint on, or from the beginning, and keep another; what the first worker reports."""
    newest = folder / "newest"
    resume = newest.read_text() if newest.exists() else ""
    trainer = TorchTrainer(
        worker,
        train_loop_config={"total": total, "stop_at": stop_at, "resume": resume},
        scaling_config=train.ScalingConfig(num_workers=workers),
        run_config=train.RunConfig(storage_path=str(folder)),
    )
    result = trainer.fit()
    newest.write_text(str(result.checkpoint.path))
    return dict(result.metrics)


if __name__ == "__main__":
    main()
