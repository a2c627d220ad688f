"""What the ranks of `test_pipelines` do, and the plain loop of one process that they are compared with."""

import tempfile
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch

WIDTH, LAYERS, M, SIZE, STEPS, LR, TOTAL = 8, 4, 4, 4, 4, 0.05, 60
SINGLE = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
MULTI = {
    "interleaved 1F1B": ScheduleInterleaved1F1B,
    "interleaved zero-bubble": ScheduleInterleavedZeroBubble,
    "looped BFS": ScheduleLoopedBFS,
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


def blocks():
    torch.manual_seed(0)
    return [Block().double() for _ in range(LAYERS)]


def data(step, part, dp):
    """The batch of a call of the schedule on data-parallel rank `dp`: M micro-batches of SIZE."""
    g = torch.Generator().manual_seed(1000 * step + 10 * part + dp)
    x = torch.randn(M * SIZE, WIDTH, generator=g, dtype=torch.float64)
    return x, x.flip(1) + torch.randn(M * SIZE, WIDTH, generator=g, dtype=torch.float64)


def loss_of(prediction, y):
    return (prediction - y).square().mean()


def plain(*, parts=1, dps=1, clip=None):
    """The moments of each step, and the weights after all, by a loop over micro-batches; gains are given to it."""
    net = nn.Sequential(*blocks())
    parameters = list(net.parameters())

    def step(t, gain):
        each = []
        for part in range(parts):
            for dp in range(dps):
                x, y = data(t, part, dp)
                for a, b in zip(x.chunk(M), y.chunk(M)):
                    each.append(torch.autograd.grad(loss_of(net(a), b), parameters))
        n = len(each)
        mean = [sum(g) / n for g in zip(*each)]
        spread = sum(float((a - b).square().sum()) for grads in each for a, b in zip(grads, mean)) / (n - 1)
        square = sum(float(g.square().sum()) for g in mean)
        factor = min(1.0, clip / (square**0.5 + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for p, g in zip(parameters, mean):
                p -= LR * gain * factor * g
        return spread, square - spread / n, n

    return net, step


def stages(layout, rank):
    """This rank's stages by `layout`: their numbers, modules, groups and the data-parallel rank."""
    pp, dp, tp, style = layout["pp"], layout.get("dp", 1), layout.get("tp", 1), layout.get("style")
    mesh = init_device_mesh("cpu", (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
    mine, many = mesh["pp"].get_local_rank(), layout.get("stages", 1)
    all_of_them, per_stage = blocks(), LAYERS // (pp * many)
    found = []
    for k in range(many):
        number = mine + k * pp
        module = nn.Sequential(*all_of_them[number * per_stage : (number + 1) * per_stage])
        if tp > 1:
            plan = {}
            for i in range(per_stage):
                plan |= {f"{i}.first": ColwiseParallel(), f"{i}.second": RowwiseParallel()}
            parallelize_module(module, mesh["tp"], plan)
        if style == "ddp":
            module = DDP(module, process_group=mesh["dp"].get_group())
        elif style == "fsdp":
            fully_shard(module, mesh=mesh["dp"])
        stage = PipelineStage(module, number, pp * many, torch.device("cpu"), group=mesh["pp"].get_group())
        found.append((number, stage, range(number * per_stage, (number + 1) * per_stage)))
    return found, mesh


def whole(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def train(rank, cases):
    """Each case on this rank: its steps' numbers and its weights by the layer's number, or its error."""
    found = {}
    for name, case in cases.items():
        layout, options = dict(case["layout"]), dict(case.get("options", {}))
        own, mesh = stages(layout, rank)
        dp = mesh["dp"].get_local_rank()
        kind, scale_grads = case["schedule"], case.get("scale_grads", True)
        make = {**SINGLE, **MULTI}[kind]
        given = own[0][1] if kind in SINGLE else [stage for _, stage, _ in own]
        loss = loss_of if not case.get("divide") else (lambda a, b: loss_of(a, b) / case["divide"])
        schedule = make(given, M, loss_fn=loss, scale_grads=scale_grads)
        modules = [stage.submod for _, stage, _ in own]
        parameters = [p for module in modules for p in module.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=LR)
        options = {"micro_batch": SIZE, "rule": anybatch.AdaScale(smoothing=0.0, decays="constant"), **options}
        if case.get("by_layer"):
            options["record"] = anybatch.RunRecord(f"{tempfile.mkdtemp()}/run.jsonl", per_layer=2)
        if case.get("adam"):
            optimizer = torch.optim.Adam(parameters, lr=LR)
        try:
            controller = anybatch.attach(optimizer, model=schedule, total=TOTAL, base_batch=SIZE, **options)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            continue
        lines, reduced = [], 0
        first = any(number == 0 for number, _, _ in own)
        last = any(number == layout["pp"] * layout.get("stages", 1) - 1 for number, _, _ in own)
        parts = case.get("parts", 1)
        for t in range(STEPS):
            try:
                for part in range(parts):
                    x, y = data(t, part, dp)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        schedule.step(*([x] if first else []), **({"target": y} if last else {}))
            except anybatch.UsageError as error:
                found[name] = f"UsageError: {error}"
                break
            if case.get("clip"):
                controller.mean_gradients()
                square = torch.tensor(sum(float(whole(p.grad).square().sum()) for p in parameters), dtype=torch.float64)
                dist.all_reduce(square, group=mesh["pp"].get_group())
                for p in parameters:
                    p.grad.mul_(min(1.0, case["clip"] / (float(square) ** 0.5 + 1e-6)))
            calls = count_reductions(optimizer.step)
            reduced = max(reduced, calls)
            optimizer.zero_grad()
            lines.append((controller.variance, controller.sqnorm, controller.gain, controller.tau, controller.count))
        if name in found:
            continue
        weights = {}
        for module, (_, _, layers) in zip(modules, own):
            inner = module.module if isinstance(module, DDP) else module
            for layer, block in zip(layers, inner):
                weights[layer] = [whole(p).detach().clone() for p in block.parameters()]
        state = controller.state_dict()
        controller.detach()
        found[name] = {"lines": lines, "weights": weights, "reductions": reduced, "state": state}
    return found


def count_reductions(step):
    """The number of all-reduces in `step()`."""
    calls, real = [0], dist.all_reduce

    def counted(*args, **kwargs):
        calls[0] += 1
        return real(*args, **kwargs)

    dist.all_reduce = counted
    try:
        with nullcontext():
            step()
    finally:
        dist.all_reduce = real
    return calls[0]
