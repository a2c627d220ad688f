"""A layer of experts over four ranks, which send each other their tokens; and the plain loop on one process."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch
from distributed.mesh_workers import mesh_of, whole
from distributed.pipeline_workers import overflow

WORLD, EXPERTS, WIDTH, TOKENS, STEPS, LR, DECAY = 4, 4, 6, 8, 5, 0.05, 0.9
BETAS, EPS, READY = (0.9, 0.99), 1e-6, 10


class Sent(torch.autograd.Function):
    """Rows of this rank, sent to the ranks of a group; backwards the gradients return."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):
        ctx.sizes, ctx.group = (sent, received), group
        found = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    def backward(ctx, grad):
        sent, received = ctx.sizes
        return Sent.apply(grad, received, sent, ctx.group), None, None, None


class Experts(nn.Module):
    """A matrix for each expert; `mesh`, if given, holds a part of them on each rank."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)
        self.mesh = None

    def forward(self, rows, expert):
        if self.mesh is None:
            return torch.einsum("tk,tkj->tj", rows, self.weight[expert])
        group, weight = self.mesh.get_group(), self.weight
        weight = weight.to_local() if hasattr(weight, "to_local") else weight
        ranks, first = self.mesh.size(), self.mesh.get_local_rank() * weight.shape[0]
        order = torch.argsort(expert, stable=True)
        sent = torch.bincount(expert // weight.shape[0], minlength=ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        sent, received = sent.tolist(), received.tolist()
        theirs = Sent.apply(torch.column_stack([rows, expert])[order], sent, received, group)
        here = theirs[:, -1].detach().round().long() - first
        found = torch.einsum("tk,tkj->tj", theirs[:, :-1], weight[here])
        return Sent.apply(found, received, sent, group)[torch.argsort(order)]


class Net(nn.Module):
    """A dense layer, a router with one expert for each token, and a dense head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        share, expert = self.router(x).softmax(-1).max(-1)
        return self.head(x + share[:, None] * self.experts(x, expert))


def made():
    torch.manual_seed(0)
    return Net().double()


def batch(step, sample):
    g = torch.Generator().manual_seed(100 * step + sample)
    x = torch.randn(TOKENS, WIDTH, generator=g, dtype=torch.float64)
    return x, torch.randn(TOKENS, 3, generator=g, dtype=torch.float64) + x[:, :3]


def loss_of(model, step, sample):
    x, y = batch(step, sample)
    return (model(x) - y).square().mean()


def is_expert(name):
    return "experts" in name


def distributed(layout, rank):
    """The model in a layout: how dense parameters and experts are held, and over how many ranks experts are spread."""
    model, spread, ranks = made(), layout["spread"], layout.get("data", WORLD)
    data, mesh = mesh_of(("dp", WORLD)), mesh_of(("efsdp", WORLD // spread), ("ep", spread))
    if layout["dense"] == "HSDP":
        data = mesh_of(("replica", 2), ("shard", 2))
    elif layout["dense"] == "FSDP2 x TP":  # the two ranks of a micro-batch hold the same experts
        both = mesh_of(("ep", 2), ("tp", 2))
        data, mesh = both["ep"], both
        columns = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, both["tp"], {"first": columns, "head": columns})
    experts = model.experts
    experts.mesh = mesh["ep"]
    placement = [layout.get("placement", Shard(0))]
    held = distribute_tensor(experts.weight.detach(), mesh["ep"], placement)
    experts.weight = nn.Parameter(held.to_local() if layout.get("plain") else held)
    if layout.get("alone"):
        for name, p in model.named_parameters():
            p.requires_grad_(is_expert(name))
    if layout.get("efsdp"):
        fully_shard(experts, mesh=mesh["efsdp"])
        if spread < WORLD:  # over one rank FSDP2 divides nothing, so `train` does
            experts.set_gradient_divide_factor(ranks)
        ignored = set()
    else:
        experts.weight.register_hook(lambda grad: grad / ranks)
        ignored = {experts.weight}
    if "overflow" in layout and rank == 1:  # of an expert's gradient, on one rank alone
        experts.weight.register_hook(overflow(layout["overflow"]))
    if layout["dense"] != "DDP":
        return fully_shard(model, mesh=data, ignored_params=ignored)
    DDP._set_params_and_buffers_to_ignore_for_model(model, ["experts.weight"])
    return DDP(model)


def optimizers(model, kind):
    """One for the dense parameters and one for the experts: torch does not step both meshes in one call."""
    make = {
        "SGD": lambda p: torch.optim.SGD(p, lr=LR),
        "Adam": lambda p: torch.optim.Adam(p, lr=LR, betas=BETAS, eps=EPS, foreach=False),
    }[kind]
    if kind == "Adam":
        return [make(list(model.parameters()))]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    split = [[p for name, p in named if is_expert(name) == which] for which in (False, True)]
    return [make(parameters) for parameters in split if parameters]


def train(rank, layouts, folder):
    """Of each layout the numbers of each step and the weights, or its error."""
    warnings.simplefilter("ignore")
    found = {}
    for name, layout in layouts.items():
        model = distributed(layout, rank)
        number = rank * layout.get("data", WORLD) // WORLD  # of the data-parallel rank
        kind, parts, steps = layout.get("optimizer", "SGD"), layout.get("accumulation", 1), layout.get("steps", STEPS)
        several = optimizers(model, kind)
        rule = anybatch.AdaScale(smoothing=0.0, decays="constant", metric="adam" if kind == "Adam" else "euclidean")
        record = [anybatch.RunRecord(f"{folder}/{name}.jsonl", per_layer=2)] if rank == 0 else None
        if kind == "Adam":
            record = None
        lines, metric = [], []
        try:
            controller = anybatch.attach(several, model=model, rule=rule, scale="count", total=60, record=record)
            if layout.get("plain"):
                loss_of(model, 0, rank).backward()
                several[0].step()
        except anybatch.AnybatchError as error:
            found[name] = f"{type(error).__name__}: {error}"
            continue
        ema = anybatch.ModelEMA(model, DECAY, clock=controller.clock)
        for t in range(steps):
            for a in range(parts):
                (loss_of(model, t, number * parts + a) / parts).backward()
            if layout.get("efsdp") and layout["spread"] == WORLD:
                model.experts.weight.grad.div_(WORLD)
            for each in several:
                each.step()
            for each in several:
                each.zero_grad()
            lines.append((controller.variance, controller.sqnorm, controller.gain, controller.tau, controller.count))
            state = controller.state_dict()
            metric.append((state["metric_variance"], state["metric_sqnorm"], state["metric_weight"]))
        inner = model.module if isinstance(model, DDP) else model
        weights = {key: whole(p) for key, p in inner.named_parameters()}
        with ema.applied():
            averages = {key: whole(p) for key, p in inner.named_parameters()}
        found[name] = {"lines": lines, "weights": weights, "averages": averages, "text": repr(controller)}
        found[name] |= {"skipped": controller.skipped, "metric": metric}
        controller.detach()
    return found


def plain(steps, *, count, kind="SGD", gains=()):
    """The moments of the dense parameters at each step, the weights and their averages, by a loop on one process.

    With Adam the moments are in its metric, once its second moments are old enough. `gains` are those of the run to
    compare with.
    """
    model = made()
    named = dict(model.named_parameters())
    dense = [name for name in named if not is_expert(name)]
    average = {name: p.detach().clone() for name, p in named.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    lines = []
    for t in range(steps):
        each = []
        for sample in range(count):
            grads = torch.autograd.grad(loss_of(model, t, sample), list(named.values()))
            each.append(dict(zip(named, grads, strict=True)))
        mean = {name: sum(g[name] for g in each) / count for name in named}
        weight = {name: torch.ones_like(p) for name, p in named.items()}
        if kind == "Adam" and t >= READY:
            weight = {name: 1 / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS) for name, v in second.items()}
        spread = sum(float(((g[n] - mean[n]).square() * weight[n]).sum()) for g in each for n in dense) / (count - 1)
        lines.append((spread, sum(float((mean[n].square() * weight[n]).sum()) for n in dense) - spread / count))
        with torch.no_grad():
            for name, p in named.items():
                if kind == "Adam":
                    first[name].mul_(BETAS[0]).add_(mean[name], alpha=1 - BETAS[0])
                    second[name].mul_(BETAS[1]).add_(mean[name].square(), alpha=1 - BETAS[1])
                    root = (second[name] / (1 - BETAS[1] ** (t + 1))).sqrt() + EPS
                    p -= LR * gains[t] ** 0.5 * first[name] / (1 - BETAS[0] ** (t + 1)) / root
                else:
                    p -= LR * gains[t] * mean[name]
                average[name].lerp_(p, 1 - DECAY ** gains[t])
    return lines, {name: p.detach() for name, p in named.items()}, average
