"""One small network by FSDP2, tensor and sequence parallelism, and by one process: the same micro-batches."""

import contextlib
import functools
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
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
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch
from anybatch._gradients.reduce import Ranks, reduce_window
from anybatch._gradients.window import Shares, Window

STEPS, WORDS, WIDTH = 4, 12, 8


@functools.cache
def mesh_of(*dimensions):
    """A mesh of dimensions `(name, size)`: each has a process group, so it is made once."""
    names, sizes = zip(*dimensions, strict=True)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


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


def wholes(tensors):
    return {name: whole(tensor) for name, tensor in tensors.items()}


def train(model, *, data=0, accumulation=1, make=torch.optim.SGD, steps=STEPS, start=0, saved=None, **attach):
    """Gains and moments of each step, and the weights and states at the end. `data` numbers the data-parallel ranks.

    With the states `saved` of another run it continues that run.
    """
    optimizer = make(model.parameters(), lr=0.05)
    options = {"rule": anybatch.AdaScale(smoothing=0.5), "scale": "count", "total": 100, **attach}
    controller = anybatch.attach(optimizer, model=model, **options)
    ema = anybatch.ModelEMA(model, 0.9, clock=controller.clock)
    whole_states = StateDictOptions(full_state_dict=True)
    if saved is not None:
        set_model_state_dict(model, saved["model"], options=whole_states)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=whole_states)
        ema.load_state_dict(saved["ema"])
    found = []
    for t in range(start, start + steps):
        for a in range(accumulation):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(a == accumulation - 1)
            with model.no_sync() if isinstance(model, DDP) and a < accumulation - 1 else contextlib.nullcontext():
                backward(model, t, data * accumulation + a, share=1 / accumulation)
        optimizer.step()
        optimizer.zero_grad()
        found.append((controller.count, controller.gain, controller.variance, controller.sqnorm, controller.tau))
    inner = model.module if isinstance(model, DDP) else model
    weights = {name: whole(p) for name, p in inner.named_parameters()}
    with ema.applied():
        average = {name: whole(p) for name, p in inner.named_parameters()}
    states = {
        "model": get_model_state_dict(model, options=whole_states),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=whole_states),
        "ema": {key: wholes(each) if key == "averages" else each for key, each in ema.state_dict().items()},
    }
    controller.detach()
    return {"steps": found, "weights": weights, "average": average, "states": states}


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
        mesh = mesh_of(("tp", world))
        return tie(parallelize_module(model, mesh, PLANS[kind]), name), 0
    if kind == "HSDP":
        mesh = mesh_of(("replica", 2), ("shard", world // 4), ("tp", 2))
        data = mesh["replica", "shard"]
        number = mesh["replica"].get_local_rank() * (world // 4) + mesh["shard"].get_local_rank()
    else:
        mesh = mesh_of(("dp", world // 2), ("tp", 2))
        data, number = mesh["dp"], mesh["dp"].get_local_rank()
    tie(parallelize_module(model, mesh["tp"], PLANS[plan]), name)
    for part in (model.up, model.down):
        fully_shard(part, mesh=data)
    return fully_shard(model, mesh=data), number


RUNS = ((1, torch.optim.AdamW), (2, torch.optim.SGD))  # accumulation and optimizer; `layout_workers` draws more


def routes(rank, world, names):
    """What each layout makes of the same micro-batches, by the layout and the accumulation."""
    warnings.simplefilter("ignore")
    found = {}
    for name in names:
        for accumulation, make in RUNS:
            model, data = layout(name, rank, world)
            found[name, accumulation] = train(model, data=data, accumulation=accumulation, make=make)
    return found


def layers(rank, world):
    """The noise by layer, in the record of the first rank."""
    model, data = layout("FSDP2xTP", rank, world)
    path = Path(tempfile.mkdtemp()) / "run.jsonl"
    record = [anybatch.RunRecord(path, per_layer=2)] if rank == 0 else None
    train(model, data=data, accumulation=2, record=record)
    return [step.per_layer for step in anybatch.read_record(path).steps] if rank == 0 else None


def held(name, world):
    """The model of a layout by its name in `RESUMES`, this rank's data-parallel number, and how many of them are."""
    mesh = mesh_of(("dp", 2), ("tp", 2))
    if name == "one process":
        return made(), 0, 1
    if name == "DDP":
        return DDP(made()), mesh.get_rank(), world
    if name == "FSDP2":
        return fully_shard(made(), mesh=mesh_of(("dp", world))), mesh.get_rank(), world
    if name == "HSDP":
        model = made()
        fully_shard(model.up, mesh=mesh)
        return fully_shard(model, mesh=mesh), mesh.get_rank(), world
    if name == "TP":
        return parallelize_module(made(), mesh_of(("tp", world)), PLANS["TP"]), 0, 1
    model = fully_shard(parallelize_module(made(), mesh["tp"], PLANS["TP+SP"]), mesh=mesh["dp"])
    return model, mesh["dp"].get_local_rank(), 2


RESUMES = [
    ("one process", "FSDP2 x TP"),
    ("FSDP2 x TP", "DDP"),
    ("DDP", "HSDP"),
    ("HSDP", "TP"),
    ("TP", "FSDP2"),
    ("FSDP2", "one process"),
]
SAMPLES = 4  # micro-batches of a step in each of them


def resumes(rank, world):
    """Of each pair of layouts: four steps in the first, saved, and four in the second."""
    warnings.simplefilter("ignore")
    alone = [dist.new_group([each]) for each in range(world)][rank]
    found = {}
    for pair in RESUMES:
        saved, steps = None, []
        for name in pair:
            model, number, ranks = held(name, world)
            options = {"process_group": alone} if name == "one process" else {}
            run = train(
                model,
                data=number,
                accumulation=SAMPLES // ranks,
                make=torch.optim.AdamW,
                start=len(steps),
                saved=saved,
                **options,
            )
            steps, saved = steps + run["steps"], run.pop("states")
        found[pair] = {**run, "steps": steps}
    return found


def refused(rank, world):
    """The errors of layouts that cannot be measured, and what torch makes of DTensors under DDP."""
    warnings.simplefilter("ignore")
    mesh = mesh_of(("dp", 2), ("tp", 2))
    line = mesh_of(("dp", world))

    def split(plan="TP+SP"):
        return parallelize_module(made(), mesh["tp"], PLANS[plan])

    def partly():
        model = split()
        fully_shard(model.up, mesh=mesh["dp"])
        return model

    def two_meshes():
        model = made()
        fully_shard(model.up, mesh=line)
        return fully_shard(model, mesh=mesh)

    def of_two_sizes():
        model = split("TP")
        parallelize_module(model, line, {"norm": SequenceParallel()})
        return model

    layouts = {
        "TP under DDP": lambda: DDP(split("TP"), device_mesh=mesh["dp"]),
        "TP and nothing over the other ranks": split,
        "a part outside of FSDP2": partly,
        "dense parts on two meshes": two_meshes,
        "TP on two meshes": of_two_sizes,
    }
    found = {}
    for name, make in layouts.items():
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            anybatch.attach(optimizer, model=model, scale="count")
        except anybatch.AnybatchError as error:
            found[name] = f"{type(error).__name__}: {error}"
    model = layouts["TP under DDP"]()
    before = len(model.state_dict())
    backward(model, 0, mesh["dp"].get_local_rank(), share=1)
    found["entries"] = before, len(model.state_dict())
    return found


def differing(rank, world):
    """The errors of a rank that differs from the others under FSDP2 x TP, by its number and by what differs."""
    found = {}
    for odd in range(world):
        model, data = layout("FSDP2xTP", rank, world)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sizes = {"base_batch": 8 * (1 + (rank == odd)), "micro_batch": 8}
        found["base_batch", odd] = error_of(lambda o=optimizer, m=model, s=sizes: anybatch.attach(o, model=m, **s))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        controller = anybatch.attach(optimizer, model=model, scale="count")
        optimizer.param_groups[0]["lr"] += 0.1 * (rank == odd)
        backward(model, 0, data, share=1)
        found["lr", odd] = error_of(optimizer.step)
        controller.detach()
    return found


def error_of(function):
    try:
        function()
    except anybatch.AnybatchError as error:
        return str(error)
    return "no error"


def checksums(rank, world, values):
    """For each list of the ranks' checksums whether two data-parallel ranks, of two each, may differ in nothing."""
    ranks, found = Ranks(dist.group.WORLD, world // 2, replicated=False, model=2), []
    for numbers in values:
        window = Window(1, Shares(1, weights=1.0, squares=1.0), {}, {})
        try:
            reduce_window(window, ranks=ranks, reduction="mean", checksum=numbers[rank])
            found.append("equal")
        except anybatch.UsageError as error:
            found.append(str(error))
    return found


def collectives(rank, world):
    """The sizes of the all-reduces of whole steps that are ours: of float64 numbers, over the world."""
    from common import counted_all_reduces

    model, data = layout("FSDP2xTP", rank, world)
    with counted_all_reduces() as sizes:
        train(model, data=data, accumulation=2)
    return sizes
