"""Random layouts of the network of `mesh_workers`: a mesh, a plan, an accumulation; and a plain loop in float64."""

import contextlib
import random
import warnings

import torch
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch
from distributed.mesh_workers import PLANS, backward, made, mesh_of, tie, whole

STEPS, LR, BETAS, EPS, READY, DECAY = 3, 0.05, (0.9, 0.99), 1e-6, 10, 0.9
ROUNDING = 2.0**-9  # of bfloat16, relative
PARTS = ("embedding", "norm", "up", "down", "head")


def draw(seed, world):
    """A layout on `world` ranks, and the loop that trains in it."""
    rng = random.Random(1000 * world + seed)
    tp = rng.choice([n for n in (1, 2, 4) if n <= world])
    data = world // tp
    styles = (
        ["FSDP2", "FSDP2", "replicate"] + ["HSDP"] * (data > 1) + ["DDP"] * (tp == 1 < world) + ["TP"] * (data == 1)
    )
    style = rng.choice(styles)
    half = style not in ("DDP", "TP") and rng.random() < 0.25
    shard = rng.choice([n for n in (1, 2, 4) if n < data]) if style == "HSDP" else data
    adam = not half and rng.random() < 0.5
    metric = adam and rng.random() < 0.5
    # By shards, Adam's metric is of a rank's own gradient: exact if all ranks have the same micro-batches.
    same = metric and style in ("FSDP2", "HSDP") and shard > 1
    accumulation = rng.choice([2, 3] if data == 1 or same else [1, 2, 3])
    plans = [name for name in PLANS if tp == 2 or "SP" not in name] if tp > 1 else [None]  # 6 words, split evenly
    return {
        "style": style,
        "shard": shard,
        "data": data,
        "tp": tp,
        "plan": "TP" if style == "TP" and tp == 1 else rng.choice(plans),
        "units": [part for part in ("up", "down") if rng.random() < 0.5],
        "frozen": rng.choice(PARTS) if rng.random() < 0.25 else None,
        "accumulation": accumulation,
        "sync": rng.random() < 0.5,
        "reshard": rng.random() < 0.7,
        "half": half,
        "adam": adam,
        "metric": metric,
        "same": same,
    }


def is_tied(case):
    return "tied" in (case["plan"] or "")


def frozen(model, case):
    """The model with one part frozen, not one that is tied to another."""
    name = case["frozen"]
    if name is not None and not (is_tied(case) and name in ("embedding", "head")):
        model.get_submodule(name).requires_grad_(False)
    return model


def laid_out(case, rank):
    """The model, and this rank's number among the data-parallel ranks."""
    model = frozen(made(tied=is_tied(case), dtype=torch.float32 if case["half"] else torch.float64), case)
    if case["style"] == "DDP":
        return DDP(model), rank
    mesh = mesh_of(("replica", case["data"] // case["shard"]), ("shard", case["shard"]), ("tp", case["tp"]))
    if case["tp"] > 1 or case["style"] == "TP":
        parallelize_module(model, mesh["tp"], PLANS[case["plan"]])
        frozen(tie(model, case["plan"]), case)
    number = rank // case["tp"]
    if case["style"] == "TP":
        return model, number
    options = {"mesh": mesh["replica", "shard"] if case["style"] == "HSDP" else mesh["shard"]}
    if case["half"]:
        options["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    wrap = replicate
    if case["style"] != "replicate":
        wrap, options["reshard_after_forward"] = fully_shard, case["reshard"]
    for part in case["units"]:
        wrap(getattr(model, part), **options)
    return wrap(model, **options), number


def train(rank, cases):
    """Of each case the numbers of each step, and the weights before each step and at the end."""
    warnings.simplefilter("ignore")
    found = {}
    for seed, case in cases.items():
        try:
            found[seed] = trained(case, rank)
        except Exception as error:
            raise RuntimeError(f"seed {seed}: {case}") from error
    return found


def trained(case, rank):
    model, number = laid_out(case, rank)
    parameters = [p for p in model.parameters() if p.requires_grad]
    metric = case["metric"]
    if case["adam"]:
        optimizer = torch.optim.Adam(parameters, lr=LR, betas=BETAS, eps=EPS)
    else:
        optimizer = torch.optim.SGD(parameters, lr=LR)
    rule = anybatch.AdaScale(
        smoothing=0.0, decays="constant", noise_factor=1.0, metric="adam" if metric else "euclidean"
    )
    controller = anybatch.attach(optimizer, model=model, rule=rule, scale="count", total=60)
    ema = anybatch.ModelEMA(model, DECAY, clock=controller.clock)
    lines, weights = [], []

    def now():
        inner = model.module if isinstance(model, DDP) else model
        return {name: whole(p) for name, p in inner.named_parameters()}

    for t in range(READY + 2 if metric else STEPS):
        weights.append(now())
        for sample in samples_of(case, number):
            last = sample == samples_of(case, number)[-1]
            context = contextlib.nullcontext()
            if isinstance(model, DDP) and not last and not case["sync"]:
                context = model.no_sync()
            elif hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last or case["sync"])
            with context:
                backward(model, t, sample, share=1 / case["accumulation"])
        optimizer.step()
        optimizer.zero_grad()
        state = controller.state_dict()
        seen = controller.variance, controller.sqnorm
        if metric and t >= READY:
            seen = (max(state[f"metric_{name}"] / state["metric_weight"], 0) for name in ("variance", "sqnorm"))
        lines.append((*seen, controller.gain, controller.tau, controller.count))
    weights.append(now())
    with ema.applied():
        average = now()
    controller.detach()
    return {"lines": lines, "weights": weights, "average": average}


def samples_of(case, number):
    """The numbers of the micro-batches of data-parallel rank `number`."""
    first = 0 if case["same"] else number * case["accumulation"]
    return range(first, first + case["accumulation"])


def plain(case, mine):
    """The lines, weights and averages of one process in float64, and the mean of each step's squared norms.

    With `half` each step begins at the weights of the run, since the roundings of bfloat16 add up.
    """
    model = frozen(made(tied=is_tied(case)), case)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    metric = case["metric"]
    first, second = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    count, tau, lines, weights, squares = case["data"] * case["accumulation"], 0.0, [], [], []
    for t in range(len(mine["lines"])):
        if case["half"]:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(mine["weights"][t][name])
        each = []
        for number in range(case["data"]):
            for sample in samples_of(case, number):
                backward(model, t, sample, share=1)
                each.append({name: p.grad for name, p in named.items()})
                model.zero_grad()
        mean = {name: sum(g[name] for g in each) / count for name in named}
        weight = {name: torch.ones_like(p) for name, p in named.items()}
        if metric and t >= READY:
            weight = {name: 1 / ((s / (1 - BETAS[1] ** t)).sqrt() + EPS) for name, s in second.items()}
        spread = sum(float(((g[n] - mean[n]).square() * weight[n]).sum()) for g in each for n in named) / (count - 1)
        variance, sqnorm = spread, sum(float((mean[n].square() * weight[n]).sum()) for n in named) - spread / count
        lines.append([max(variance, 0), max(sqnorm, 0)])
        if case["half"]:  # the gain of the run's own moments
            variance, sqnorm = mine["lines"][t][:2]
        variance, sqnorm = max(variance, 0), max(sqnorm, 0)
        full = (variance + sqnorm) / (variance / count + sqnorm)
        gain = full ** (1 - 0.5 ** ((t + 2) / 2))  # of t + 1 samples
        factor = gain**0.5 if case["adam"] else gain
        tau = (mine["lines"][t - 1][3] if t and case["half"] else tau) + gain
        lines[-1] += [gain, tau, count]
        with torch.no_grad():
            for name, p in named.items():
                if case["adam"]:
                    first[name].mul_(BETAS[0]).add_(mean[name], alpha=1 - BETAS[0])
                    second[name].mul_(BETAS[1]).add_(mean[name].square(), alpha=1 - BETAS[1])
                    root = (second[name] / (1 - BETAS[1] ** (t + 1))).sqrt() + EPS
                    p -= LR * factor * first[name] / (1 - BETAS[0] ** (t + 1)) / root
                else:
                    p -= LR * factor * mean[name]
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - DECAY**gain)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        squares.append(sum(float(g[name].square().sum()) for g in each for name in named) / count)
    return lines, weights, average, squares
