"""One tiny GPT at 8 times its batch in several layouts: the loss curve and the gains are those of one process.

    python -m benchmarks.layouts [--total 400] [--json docs/distributed/layouts.json]

Every layout trains on the same micro-batches: in float64, and DeepSpeed in float32, compared with one process in
float32. The distance of two curves is the root mean square, over 20 points of tau, of the logarithm of the ratio of
their training losses.
"""

import argparse
import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from math import log, sqrt
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import anybatch

SCALE, BASE, CONTEXT, WIDTH, HEADS, LAYERS = 8, 8, 32, 32, 2, 2
POINTS = 20
LAYOUTS = {  # by name, the number of processes
    "one process": 1,
    "DDP": 2,
    "FSDP2 x TP": 4,
    "1F1B x FSDP2": 4,
    "1F1B x TP x FSDP2": 8,
    "DeepSpeed ZeRO-2": 2,
}

Curve = list[tuple[float, float, float]]  # tau, loss and gain of each step


class Embed(nn.Module):
    """Bytes and their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return a vector for each byte."""
        out: Tensor = self.token(x) + self.position
        return out


class Block(nn.Module):
    """Causal attention and a multilayer perceptron, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next layer's vectors."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return out


class Head(nn.Module):
    """Logits of the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        out: Tensor = self.logits(self.norm(x))
        return out


PLAN: dict[str, Any] = {name: ColwiseParallel() for name in ("q", "k", "v", "up")} | {
    name: RowwiseParallel() for name in ("o", "down")
}


def parts(seed: int) -> list[nn.Module]:
    """The layers of the GPT."""
    torch.manual_seed(seed)
    return [Embed(), *(Block() for _ in range(LAYERS)), Head()]


def parallelize(module: nn.Module, mesh: Any) -> None:
    """Split a layer over the tensor-parallel ranks."""
    if isinstance(module, Block):
        parallelize_module(module, mesh, PLAN)
    elif isinstance(module, Head):
        parallelize_module(module, mesh, {"logits": ColwiseParallel(output_layouts=Replicate())})


def text() -> Tensor:
    """The source of torch's own optimizers and layers, as bytes."""
    root = Path(torch.__file__).parent
    files = sorted((root / "optim").glob("*.py")) + sorted((root / "nn/modules").glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def micro_batches(data: Tensor, *, seed: int, step: int, first: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches `first` to `first + count` of a step's `SCALE`."""
    for number in range(first, first + count):
        draws = torch.Generator().manual_seed((seed * 1_000_003 + step) * SCALE + number)
        at = torch.randint(len(data) - CONTEXT - 1, (BASE, 1), generator=draws) + torch.arange(CONTEXT + 1)
        window = data[at].long()
        yield window[:, :-1], window[:, 1:]


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Return nats for each byte."""
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def train(rank: int, layout: str, total: int, seed: int) -> Curve:
    """The curve of one layout on this rank."""
    if layout.startswith("1F1B"):
        return _pipeline(layout, total, seed)
    layers = parts(seed)
    model: nn.Module = nn.Sequential(*layers)
    data_ranks, number = 1, 0
    if layout == "FSDP2 x TP":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        for layer in layers:
            parallelize(layer, mesh["tp"])
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        data_ranks, number = 2, mesh["dp"].get_local_rank()
    elif layout != "one process":
        data_ranks, number = 2, rank
    if layout == "DDP":
        model = DistributedDataParallel(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    accumulation = SCALE // data_ranks
    if layout.startswith("DeepSpeed"):
        os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": BASE,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": 2, "overlap_comm": False},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        }
        model, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    controller = _attached(optimizer, model, total)
    data, curve = text(), Curve()
    while not controller.done:
        losses = []
        batches = micro_batches(data, seed=seed, step=len(curve), first=number * accumulation, count=accumulation)
        for a, (x, y) in enumerate(batches):
            last = a == accumulation - 1
            if layout == "FSDP2 x TP":
                model.set_requires_gradient_sync(last)  # type: ignore[operator]
            unsynced = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if unsynced else contextlib.nullcontext():  # type: ignore[operator]
                loss = loss_of(model(x), y)
                if layout.startswith("DeepSpeed"):
                    model.backward(loss)  # type: ignore[operator]
                    model.step()  # type: ignore[operator]
                else:
                    (loss / accumulation).backward()
            losses.append(loss.item())
        if not layout.startswith("DeepSpeed"):
            optimizer.step()
            optimizer.zero_grad()
        curve.append((controller.tau, _mean(fmean(losses)), controller.gain))
    controller.detach()
    return curve


def _pipeline(layout: str, total: int, seed: int) -> Curve:
    """The curve of two pipeline stages, each over two data-parallel ranks, with or without tensor parallelism."""
    tp = 2 if "TP" in layout else 1
    mesh = init_device_mesh("cpu", (2, 2, tp), mesh_dim_names=("pp", "dp", "tp"))
    stage_number, number = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    layers, half = parts(seed), (LAYERS + 2) // 2
    module = nn.Sequential(*layers[stage_number * half : (stage_number + 1) * half])
    for layer in module:
        if tp > 1:
            parallelize(layer, mesh["tp"])
    fully_shard(module, mesh=mesh["dp"])
    stage = PipelineStage(module, stage_number, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    accumulation = SCALE // 2
    schedule: Any = Schedule1F1B(stage, accumulation, loss_fn=loss_of)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.95))
    controller = _attached(optimizer, schedule, total)
    data, curve = text(), Curve()
    while not controller.done:
        pairs = list(micro_batches(data, seed=seed, step=len(curve), first=number * accumulation, count=accumulation))
        x, y = (torch.cat([pair[i] for pair in pairs]) for i in range(2))
        losses: list[Tensor] = []
        schedule.step(*([x] if stage_number == 0 else []), **({"target": y, "losses": losses} if stage_number else {}))
        optimizer.step()
        optimizer.zero_grad()
        mine = [2 * fmean(each.item() for each in losses)] if stage_number else [0.0]  # half of the ranks have losses
        curve.append((controller.tau, _mean(mine[0]), controller.gain))
    controller.detach()
    return curve


def _attached(optimizer: Any, model: Any, total: int) -> anybatch.Controller:
    return anybatch.attach(optimizer, model=model, total=total, base_batch=BASE, micro_batch=BASE)


def _mean(value: float) -> float:
    """The mean over all ranks."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found)
    return found.item() / dist.get_world_size()


def _entry(rank: int, layout: str, total: int, seed: int, single: bool, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32 if single else torch.float64)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # of the logits
    world = LAYOUTS[layout]
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    curve = train(rank, layout, total, seed)
    if rank == 0:
        (Path(folder) / "curve.json").write_text(json.dumps(curve))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def curve_of(layout: str, total: int, seed: int, *, single: bool = False) -> Curve:
    """Train one layout in processes of its own, in float32 if `single`."""
    with tempfile.TemporaryDirectory() as folder:
        start: Callable[..., Any] = mp.spawn  # type: ignore[attr-defined]
        start(_entry, args=(layout, total, seed, single, folder), nprocs=LAYOUTS[layout])
        return [tuple(step) for step in json.loads((Path(folder) / "curve.json").read_text())]


def distance(one: Curve, other: Curve, total: int) -> float:
    """The root mean square of the logarithm of the losses' ratio."""
    points = [total * (k + 1) / POINTS for k in range(POINTS)]
    return sqrt(fmean(log(_at(tau, one) / _at(tau, other)) ** 2 for tau in points))


def _at(tau: float, curve: Curve) -> float:
    """The loss at tau, between the two steps around it."""
    after = next((i for i, step in enumerate(curve) if step[0] >= tau), len(curve) - 1)
    (left, low, _), (right, high, _) = curve[max(after - 1, 0)], curve[after]
    share = min((tau - left) / (right - left), 1.0) if right > left else 1.0
    return low + share * (high - low)


def main() -> None:
    """Train all layouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=int, default=400, help="base iterations")
    parser.add_argument("--only", default=",".join(LAYOUTS), help="layouts, comma-separated")
    parser.add_argument("--json", type=Path, help="write the numbers into this file")
    args = parser.parse_args()
    plains = {single: curve_of("one process", args.total, 0, single=single) for single in (False, True)}
    rows: list[dict[str, Any]] = []
    for layout, seed in [("one process", 1), *((name, 0) for name in args.only.split(",") if name != "one process")]:
        single = layout.startswith("DeepSpeed")
        curve, plain = curve_of(layout, args.total, seed, single=single), plains[single]
        apart = [abs(a[2] / b[2] - 1) for a, b in zip(curve, plain, strict=False)]
        row = {
            "layout": layout + (", another seed" if seed else ""),
            "processes": LAYOUTS[layout],
            "steps": len(curve),
            "loss": fmean(step[1] for step in curve[-10:]),
            "distance": distance(curve, plain, args.total),
            "gain_median": median(apart),
            "gain_most": max(apart),
        }
        rows.append(row)
        print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    found = {"total": args.total, "scale": SCALE, "torch": torch.__version__, "steps": len(plains[False]),
             "loss": fmean(step[1] for step in plains[False][-10:]), "rows": rows}  # fmt: skip
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
