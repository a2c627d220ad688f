"""One small network by FSDP2, tensor and sequence parallelism, and by one process: the same micro-batches."""

import contextlib
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import anybatch

STEPS, WORDS, WIDTH = 4, 12, 8


class Net(nn.Module):
    """An embedding, a norm, a block and a head; the head's weight may be the embedding's."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.norm(self.embedding(x))
        return self.head(x + self.down(torch.relu(self.up(x))))


def made(*, tied=False, dtype=torch.float64):
    torch.manual_seed(0)
    return Net(tied=tied).to(dtype)


PLANS = {
    "TP": {"up": ColwiseParallel(), "down": RowwiseParallel(), "head": ColwiseParallel(output_layouts=Replicate())},
    "TP+SP": {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
    "TP+SP, loss parallel": {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    },
    "TP, tied": {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    },
}


def batch(step, sample):
    g = torch.Generator().manual_seed(1000 * step + sample)
    return torch.randint(WORDS, (2, 6), generator=g), torch.randint(WORDS, (2, 6), generator=g)


def backward(model, step, sample, *, share):
    x, y = batch(step, sample)
    logits = model(x).flatten(0, 1)
    with loss_parallel() if hasattr(logits, "placements") else contextlib.nullcontext():
        (nn.functional.cross_entropy(logits, y.flatten()) * share).backward()


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().double().clone()


def train(model, *, data=0, accumulation=1, make=torch.optim.SGD, steps=STEPS, start=0, state=None, **attach):
    """Gains and moments of each step, and the weights at the end. `data` numbers the data-parallel ranks."""
    optimizer = make(model.parameters(), lr=0.05)
    options = {"rule": anybatch.AdaScale(smoothing=0.5), "scale": "count", "total": 100, **attach}
    controller = anybatch.attach(optimizer, model=model, **options)
    ema = anybatch.ModelEMA(model, 0.9, clock=controller.clock)
    if state is not None:
        controller.load_state_dict(state)
    found = []
    for t in range(start, start + steps):
        for a in range(accumulation):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(a == accumulation - 1)
            backward(model, t, data * accumulation + a, share=1 / accumulation)
        optimizer.step()
        optimizer.zero_grad()
        found.append((controller.count, controller.gain, controller.variance, controller.sqnorm, controller.tau))
    weights = {name: whole(p) for name, p in model.named_parameters()}
    with ema.applied():
        average = {name: whole(p) for name, p in model.named_parameters()}
    state = controller.state_dict()
    controller.detach()
    return {"steps": found, "weights": weights, "average": average, "state": state}


def tie(model, name):
    """Torch makes two parameters of a tied one when it distributes them."""
    if "tied" in name:
        model.head.weight = model.embedding.weight
    return model


def layout(name, rank, world):
    """The model of a layout, and this rank's number among the data-parallel ranks."""
    model = made(tied="tied" in name)
    kind, _, plan = name.partition("x")
    if kind in PLANS:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        return tie(parallelize_module(model, mesh, PLANS[kind]), name), 0
    if kind == "HSDP":
        mesh = init_device_mesh("cpu", (2, world // 4, 2), mesh_dim_names=("replica", "shard", "tp"))
        data = mesh["replica", "shard"]
        number = mesh["replica"].get_local_rank() * (world // 4) + mesh["shard"].get_local_rank()
    else:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        data, number = mesh["dp"], mesh["dp"].get_local_rank()
    tie(parallelize_module(model, mesh["tp"], PLANS[plan]), name)
    for part in (model.up, model.down):
        fully_shard(part, mesh=data)
    return fully_shard(model, mesh=data), number


def routes(rank, world, names):
    """What each layout makes of the same micro-batches, by the layout, the accumulation and the optimizer."""
    warnings.simplefilter("ignore")
    found = {}
    for name in names:
        for accumulation in (1, 2):
            for make in (torch.optim.SGD, torch.optim.AdamW):
                model, data = layout(name, rank, world)
                found[name, accumulation, make.__name__] = train(model, data=data, accumulation=accumulation, make=make)
    return found


def layers(rank, world):
    """The noise by layer, in the record of the first rank."""
    model, data = layout("FSDP2xTP", rank, world)
    path = Path(tempfile.mkdtemp()) / "run.jsonl"
    record = [anybatch.RunRecord(path, per_layer=2)] if rank == 0 else None
    train(model, data=data, accumulation=2, record=record)
    return [step.per_layer for step in anybatch.read_record(path).steps] if rank == 0 else None


def resumed(rank, world, first, second, state):
    """Four steps in a layout after a state of another one, or the first four without one."""
    warnings.simplefilter("ignore")
    model, data = layout(second if state else first, rank, world)
    return train(model, data=data, accumulation=2, make=torch.optim.SGD, state=state)["state"]


def refused(rank, world):
    """The errors of what cannot be combined with tensor parallelism."""
    model, _ = layout("FSDP2xTP", rank, world)
    found = {}
    with contextlib.suppress(RuntimeError):
        optimizer = torch.optim.AdamW(model.parameters())
        try:
            anybatch.attach(optimizer, model=model, scale="count", rule=anybatch.AdaScale(metric="adam"))
        except anybatch.AnybatchError as error:
            found["metric"] = str(error)
    return found


def collectives(rank, world):
    """The sizes of the all-reduces of whole steps that are ours: of float64 numbers, over the world."""
    from common import counted_all_reduces

    model, data = layout("FSDP2xTP", rank, world)
    with counted_all_reduces() as sizes:
        train(model, data=data, accumulation=2)
    return sizes
