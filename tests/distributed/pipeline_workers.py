"""What the ranks of `test_pipelines` do, and the plain loop of one process that they are compared with."""

import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
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
    "ZBV": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}
V = ("ZBV", "DualPipeV")  # a rank has the stages k and 2 pp - 1 - k
BETAS, EPS, READY, DECAY = (0.9, 0.99), 1e-6, 10, 0.9


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


def plain(*, parts=1, dps=1, clip=None, frozen=False, adam=False):
    """A loop over micro-batches of the whole model: the moments of each step; gains and iterations are given to it.

    Returns the model, its averages, and the function that takes a step.
    """
    net = nn.Sequential(*blocks())
    parameters = list(net.parameters())[frozen:]
    averages = [p.detach().clone() for p in net.parameters()]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def step(t, gain):
        each = []
        for part in range(parts):
            for dp in range(dps):
                x, y = data(t, part, dp)
                for a, b in zip(x.chunk(M), y.chunk(M)):
                    each.append(torch.autograd.grad(loss_of(net(a), b), parameters))
        n = len(each)
        mean = [sum(g) / n for g in zip(*each)]
        weight = [torch.ones_like(g) for g in mean]
        if adam and t >= READY:
            weight = [1 / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS) for v in second]
        spread, square = 0.0, sum(float((g.square() * w).sum()) for g, w in zip(mean, weight))
        for grads in each:
            spread += sum(float(((a - b).square() * w).sum()) for a, b, w in zip(grads, mean, weight)) / (n - 1)
        factor = min(1.0, clip / (square**0.5 + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for p, g, m, v in zip(parameters, mean, first, second):
                if adam:
                    m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
                    v.mul_(BETAS[1]).add_(g.square(), alpha=1 - BETAS[1])
                    root = (v / (1 - BETAS[1] ** (t + 1))).sqrt() + EPS
                    p -= LR * gain**0.5 * m / (1 - BETAS[0] ** (t + 1)) / root
                else:
                    p -= LR * gain * factor * g
            for average, p in zip(averages, net.parameters()):
                average.lerp_(p, 1 - DECAY**gain)
        return spread, square - spread / n, n

    return net, averages, step


def stages(layout, rank):
    """This rank's stages by `layout`: their numbers, modules, groups and the data-parallel rank."""
    pp, dp, tp, style = layout["pp"], layout.get("dp", 1), layout.get("tp", 1), layout.get("style")
    mesh = init_device_mesh("cpu", (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
    mine, many = mesh["pp"].get_local_rank(), layout.get("stages", 1)
    all_of_them, per_stage = blocks(), LAYERS // (pp * many)
    found = []
    for k in range(many):
        number = 2 * pp - 1 - mine if k and layout.get("v") else mine + k * pp
        module = nn.Sequential(*all_of_them[number * per_stage : (number + 1) * per_stage])
        if tp > 1:
            plan = {}
            for i in range(per_stage):
                plan |= {f"{i}.first": ColwiseParallel(), f"{i}.second": RowwiseParallel()}
            parallelize_module(module, mesh["tp"], plan)
        if style == "ddp":
            unused = layout.get("unused", False)
            if not (k and layout.get("bare")) and layout.get("bare_stage") != mine:
                module = DDP(module, process_group=mesh["dp"].get_group(), find_unused_parameters=unused)
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
        scaler = case["scaler"]("cpu", init_scale=4.0, growth_interval=2) if case.get("scaler") else None
        divide = case.get("divide", 1)

        def loss(a, b, scaler=scaler, divide=divide):
            value = loss_of(a, b) / divide
            return value if scaler is None else scaler.scale(value)

        schedule = make(given, M, loss_fn=loss, scale_grads=scale_grads)
        modules = [stage.submod for _, stage, _ in own]
        parameters = [p for module in modules for p in module.parameters()]
        if case.get("frozen") and rank == 0:
            parameters[0].requires_grad_(False)
        optimizer = torch.optim.SGD(parameters, lr=LR)
        options = {"micro_batch": SIZE, "rule": anybatch.AdaScale(smoothing=0.0, decays="constant"), **options}
        if case.get("by_layer"):
            options["record"] = anybatch.RunRecord(f"{tempfile.mkdtemp()}/run.jsonl", per_layer=2)
        elif case.get("record"):
            options["record"] = f"{tempfile.mkdtemp()}/run.jsonl" if rank == 0 else None
        if case.get("adam"):
            optimizer = torch.optim.Adam(parameters, lr=LR, betas=BETAS, eps=EPS)
        if case.get("groups") and rank == 0:
            optimizer = torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=LR)
        elif case.get("groups"):  # this stage has nothing for the second group
            empty = [{"params": []}] if case["groups"] == "empty" else []
            optimizer = torch.optim.SGD([{"params": parameters}, *empty], lr=LR)
        if scaler is not None:
            options["grad_scaler"] = scaler
            scaler.scale(torch.ones(1))  # makes the factor, which the loss does on the last stage alone
        if case.get("overflow") and rank == 0:  # of one gradient of one stage, in the second step
            parameters[0].register_hook(overflow(M + 2))
        try:
            controller = anybatch.attach(optimizer, model=schedule, total=TOTAL, base_batch=SIZE, **options)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            continue
        if case.get("state"):
            controller.load_state_dict(case["state"])
        emas = [anybatch.ModelEMA(module, DECAY, clock=controller.clock) for module in modules]
        lines, metric, reduced = [], [], 0
        first = any(number == 0 for number, _, _ in own)
        last = any(number == layout["pp"] * layout.get("stages", 1) - 1 for number, _, _ in own)
        parts = case.get("parts", 1)
        for t in range(case.get("steps", STEPS)):
            try:
                for part in range(parts):
                    x, y = data(t, part, dp)
                    given = ([x] if first else []), ({"target": y} if last else {})
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        if case.get("eval"):
                            schedule.eval(*given[0], **given[1])
                        if case.get("paused"):
                            with controller.paused():
                                schedule.step(*given[0], **given[1])
                        if case.get("discarded"):
                            schedule.step(*given[0], **given[1])
                        if part == 0:
                            optimizer.zero_grad()
                        schedule.step(*given[0], **given[1])
                if case.get("outside"):
                    sum(p.square().sum() for p in parameters).backward()
            except anybatch.UsageError as error:
                found[name] = f"UsageError: {error}"
                break
            if case.get("clip"):
                controller.mean_gradients()
                square = torch.tensor(sum(float(whole(p.grad).square().sum()) for p in parameters), dtype=torch.float64)
                dist.all_reduce(square, group=mesh["pp"].get_group())
                for p in parameters:
                    p.grad.mul_(min(1.0, case["clip"] / (float(square) ** 0.5 + 1e-6)))
            peeked = controller.peek() if case.get("peek") else None
            if scaler is None:
                reduced = max(reduced, count_reductions(optimizer.step))
            else:
                scaler.step(optimizer)
                scaler.update()
            assert peeked is None or peeked == controller.gain
            optimizer.zero_grad(set_to_none=not case.get("zeros"))
            lines.append((controller.variance, controller.sqnorm, controller.gain, controller.tau, controller.count))
            state = controller.state_dict()
            metric.append((state["metric_variance"], state["metric_sqnorm"], state["metric_weight"]))
        if name in found:
            continue
        weights = weights_by_layer(modules, own)
        with ExitStack() as stack:
            for ema in emas:
                stack.enter_context(ema.applied())
            averages = weights_by_layer(modules, own)
        state = controller.state_dict()
        controller.detach()
        found[name] = {"lines": lines, "weights": weights, "averages": averages, "reductions": reduced, "state": state}
        found[name]["metric"] = metric
        found[name]["hooked"] = "_step_microbatches" in vars(schedule)
        if case.get("record") and rank == 0:
            found[name]["record"] = [step.gain for step in anybatch.read_record(Path(options["record"])).steps]
    return found


def weights_by_layer(modules, own):
    found = {}
    for module, (_, _, layers) in zip(modules, own):
        inner = module.module if isinstance(module, DDP) else module
        for layer, block in zip(layers, inner):
            found[layer] = [whole(p).detach().clone() for p in block.parameters()]
    return found


def overflow(call):
    """A hook that makes one gradient infinite: that of its `call`-th call."""
    calls = []

    def hook(grad):
        calls.append(0)
        return grad * torch.inf if len(calls) == call else grad

    return hook


def count_reductions(step):
    """The number of all-reduces in `step()`."""
    calls, real = [0], dist.all_reduce

    def counted(*args, **kwargs):
        calls[0] += 1
        return real(*args, **kwargs)

    dist.all_reduce = counted
    try:
        step()
    finally:
        dist.all_reduce = real
    return calls[0]
