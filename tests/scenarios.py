"""Random scenarios of training: what is drawn, and the library's run of it. `scenario_oracle` has the plain loop.

Both sides share the model, the data and the drawn numbers here, and nothing that anybatch computes.
"""

import contextlib
import math
import random
import tempfile
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import lr_scheduler

import anybatch

WIDTH = 4


class Net(nn.Module):
    """Two layers and a head, with whatever makes gradients arrive oddly."""

    def __init__(self, *, tied, twice, frozen, branch, never):
        super().__init__()
        self.twice = twice
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)
        self.branch = nn.Linear(WIDTH, WIDTH) if branch else None
        self.never = nn.Linear(3, 2) if never else None
        if tied:
            self.second.weight = self.first.weight
        for parameter in {"": [], "layer": self.first.parameters(), "bias": [self.second.bias]}[frozen]:
            parameter.requires_grad_(False)

    def forward(self, x, use_branch):
        for layer in (self.first, self.first, self.second) if self.twice else (self.first, self.second):
            x = torch.tanh(layer(x))
        return self.head(x + self.branch(x) if use_branch else x)


@dataclass(frozen=True)
class MicroBatch:
    index: int
    size: int
    use_branch: bool


@dataclass(frozen=True)
class Scenario:
    """One drawn training; a window is a list of micro-batches, those of rank 0 first."""

    seed: int
    world: int
    double: bool
    net: dict
    left_out: bool
    optimizer: str
    groups: list
    foreach: bool | None
    tensor_lr: bool
    windows: list
    sized: bool
    batch: dict
    rule: str
    options: dict
    reduction: str
    total: float | None
    schedule: tuple
    set_to_none: bool
    clip: float | None
    mean_first: bool
    sync_every: bool
    bucket_view: bool
    by_layer: bool
    decays: object
    clamp: float | None  # the user clamps `.grad.data` after the backwards
    bad: frozenset  # windows in which one micro-batch's loss is not finite
    peeked: bool
    paused: bool  # a backward that is no training comes before each window
    auto: bool  # sizes are read from the forwards
    together: bool  # each loss is two backwards of one micro-batch
    resumed: int | None  # the window before which another controller continues from the state

    @property
    def dtype(self):
        return torch.float64 if self.double else torch.float32

    def model(self):
        """The net as it begins, in float32."""
        torch.manual_seed(self.seed)
        return Net(**self.net)

    def data(self, micro_batch):
        """Numbers that float32 holds, so that both sides train on the same ones."""
        g = torch.Generator().manual_seed(10_000 * self.seed + micro_batch.index)
        x = torch.randn(micro_batch.size, WIDTH, generator=g, dtype=torch.float32)
        y = x[:, :2] + torch.randn(micro_batch.size, 2, generator=g, dtype=torch.float32)
        return x, y

    def parameters_of(self, net):
        """The trained parameters, one list a group: dealt out in turn."""
        all_of_them = [p for p in net.parameters() if p.requires_grad]
        mine = all_of_them[:-1] if self.left_out else all_of_them
        return [mine[i :: len(self.groups)] for i in range(len(self.groups))]


def draw(seed, *, engine="one", world=1):
    """The scenario of this seed."""
    r = random.Random(f"{engine} {seed}")
    maybe = lambda share: r.random() < share  # noqa: E731
    net = {
        "tied": maybe(0.25),
        "twice": maybe(0.25),
        "frozen": r.choice(["", "", "", "layer", "bias"]),
        "branch": maybe(0.4),
        "never": maybe(0.2),
    }
    if net["tied"] and net["frozen"] == "layer":
        net["frozen"] = ""
    base = r.choice([2.0, 3.0, 4.0, 6.5, 40.0])
    sized, kind = maybe(0.4), r.choice(["sizes", "sizes", "sizes", "count", "number"])
    size, most = r.randint(2, 6), r.randint(1, 5)
    windows, index = [], 0
    for _ in range(r.randint(4, 8)):
        accumulation = r.randint(1, most) if maybe(0.5) else most
        use = [net["branch"] and maybe(0.5) for _ in range(accumulation)]
        window = []
        for _rank in range(world):
            for a in range(accumulation):
                own = net["branch"] and maybe(0.5) if engine == "DDP" else use[a]  # FSDP2 gathers on all ranks or none
                window.append(MicroBatch(index, r.randint(1, 8) if sized else size, own))
                index += 1
        windows.append(window)
    total = r.choice([None, 20.0, 60.0, 300.0, 5000.0])
    optimizer = r.choice(["SGD", "SGD", "Adam", "AdamW"])
    reduction = r.choice(["mean", "mean", "sum"])
    rule, options, decays = _rule(r, total)
    own = random.Random(f"own {engine} {seed}")  # of what came to the generator later; the older draws stay
    if reduction == "sum" and own.random() < 0.4:
        reduction = own.randint(1, 5)
    batch = {
        "sizes": {"base_batch": base, "micro_batch": float(size)},
        "count": {"scale": "count"},
        "number": {"scale": r.choice([0.5, 1.0, 2.5, 16.0])},
    }[kind]
    if kind == "sizes" and maybe(0.3):
        batch["examples"] = base * r.choice([1.5, 8.0, 100.0])
    if rule == "AdaScale" and world == 1 and most == 1 and not sized and "examples" not in batch:
        options["consecutive"] = maybe(0.7)
    if rule == "AdaScale" and world == 1 and most == 1 and sized and kind == "sizes" and "examples" not in batch:
        options["consecutive"] = own.random() < 0.7
    if rule == "AdaScale" and not options.get("consecutive"):
        options["every"] = random.Random(f"every {engine} {seed}").choice([1, 1, 2, 3])
    foreach = r.choice([None, None, True, False])
    return Scenario(
        seed=seed,
        world=world,
        double=maybe(0.85),
        net=net,
        left_out=maybe(0.15),
        optimizer=optimizer,
        groups=[_group(r, optimizer, 1.0 if reduction == "mean" else 1 / most) for _ in range(r.choice([1, 1, 2, 3]))],
        foreach=foreach,
        tensor_lr=foreach is not True and engine != "FSDP2" and maybe(0.15),
        windows=windows,
        sized=sized and kind == "sizes",
        batch=batch,
        rule=rule,
        options=options,
        reduction=reduction,
        total=total,
        schedule=_schedule(r),
        set_to_none=maybe(0.6),
        clip=r.choice([None, None, None, 0.5]),
        mean_first=random.Random(f"mean first {engine} {seed}").random() < 0.5,
        sync_every=maybe(0.5),
        bucket_view=maybe(0.5),
        by_layer=not (net["tied"] or net["twice"]) and maybe(0.5),
        decays=decays,
        clamp=own.choice([None, None, 0.3]) if world == 1 else None,
        # Between the steps that are measured nothing is noticed at once.
        bad=frozenset(i for i in range(len(windows)) if own.random() < 0.15)
        if world == 1 and options.get("every", 1) == 1 and own.random() < 0.5
        else frozenset(),
        peeked=own.random() < 0.3,
        paused=world == 1 and own.random() < 0.3,
        auto=kind == "sizes" and own.random() < 0.3,
        together=world == 1 and not options.get("consecutive") and own.random() < 0.25,
        resumed=own.randrange(1, len(windows)) if world == 1 and own.random() < 0.4 else None,
    )


def _rule(r, total):
    decays = r.choice(["auto", "auto", "clock", "constant", 0.5, 0.3])
    name = r.choice(["AdaScale"] * 8 + ["Identity", "Linear", "SquareRoot"])
    if name == "Linear":
        warmup = r.choice([0.0, 0.3]) if total else 0.0
        return name, {"warmup": warmup, "steps": r.choice([None, 12]) if total else None}, decays
    if name != "AdaScale":
        return name, {}, decays
    options = {
        "estimator": r.choice(["unbiased", "paper"]),
        "smoothing": r.choice([None, None, "paper", 0.0, 0.3, 0.77, 0.95]),
        "noise_factor": r.choice([None, None, 0.7, 1.0, 3.0]),
        "every": 1,
    }
    return name, options, decays


def _group(r, optimizer, unit):
    decay = r.choice([0.0, 0.02])
    if optimizer != "SGD":
        lr = r.uniform(0.001, 0.02)
        betas = (r.choice([0.8, 0.9]), r.choice([0.9, 0.99, 0.999]))
        return {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": decay}
    momentum = r.choice([0.0, 0.5, 0.9])
    nesterov = momentum > 0 and r.random() < 0.4
    dampening = r.choice([0.0, 0.0, 0.3]) if momentum and not nesterov else 0.0
    return {
        "lr": unit * r.uniform(0.003, 0.05),
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": decay,
    }


def _schedule(r):
    """A torch scheduler's name and options; `scenario_oracle.schedule` has its closed form."""
    return r.choice(
        [
            ("", {}),
            ("StepLR", {"step_size": r.randint(2, 9), "gamma": 0.7}),
            ("MultiStepLR", {"milestones": [3, r.randint(4, 12)], "gamma": 0.5}),
            ("ExponentialLR", {"gamma": 0.97}),
            ("CosineAnnealingLR", {"T_max": r.randint(30, 300)}),
            ("LinearLR", {"start_factor": 0.2, "total_iters": r.randint(3, 20)}),
            ("LambdaLR", {"lr_lambda": inverse_root}),
        ]
    )


def inverse_root(i):
    return 1 / math.sqrt(1 + i)


# ---- the library's side ----


def run(scenario, *, wrap=lambda net, _: net, rank=0):
    """What the library made of it: one line a step, and the final weights by name."""
    net, before = scenario.model(), torch.get_default_dtype()
    torch.set_default_dtype(scenario.dtype)  # Adam counts its steps in the default type
    try:
        return _train(scenario, net.to(scenario.dtype), wrap, rank)
    finally:
        torch.set_default_dtype(before)


def _train(s, net, wrap, rank):
    model = wrap(net, s)
    groups = [
        {**group, "lr": torch.tensor(group["lr"], dtype=s.dtype) if s.tensor_lr else group["lr"], "params": parameters}
        for group, parameters in zip(s.groups, s.parameters_of(net))
    ]
    optimizer = getattr(torch.optim, s.optimizer)(groups, foreach=s.foreach)
    name, options = s.schedule
    scheduler = getattr(lr_scheduler, name)(optimizer, **options) if name else None
    records, inside, lines, folder = [], [], [], tempfile.TemporaryDirectory()
    record = [records.append]
    if s.by_layer and s.rule == "AdaScale":  # on no rank does it change the training
        record.append(anybatch.RunRecord(f"{folder.name}/{rank}.jsonl", per_layer=2))
    batch = {**s.batch, "micro_batch": "auto"} if s.auto else s.batch

    def attach(record):
        return anybatch.attach(
            optimizer, model=model, scheduler=scheduler, total=s.total, reduction=s.reduction,
            rule=getattr(anybatch, s.rule)(decays=s.decays, **s.options), record=record, **batch,
        )  # fmt: skip

    controller = attach(record)
    shown = {"lr": "lr", "momentum": "momentum", "weight decay": "weight_decay"}

    def look(o, *_):  # inside of the step, after the controller's own hook
        inside.append({n: [float(g.get(key, 0)) for g in o.param_groups] for n, key in shown.items()})

    watch = optimizer.register_step_pre_hook(look)
    for number, window in enumerate(s.windows):
        if number == s.resumed:
            state, skipped = controller.state_dict(), controller.skipped
            controller.detach()
            optimizer.load_state_dict(optimizer.state_dict())
            controller = attach(record)
            controller.load_state_dict(state)
            watch.remove()
            watch = optimizer.register_step_pre_hook(look)
            assert controller.skipped == skipped
        own = len(window) // s.world
        divisor = {"mean": own, "sum": 1}.get(s.reduction, s.reduction)
        if s.paused:
            with controller.paused():
                model(s.data(window[0])[0].to(s.dtype), False).sum().backward()
                optimizer.zero_grad(set_to_none=s.set_to_none)
                for p in net.parameters():  # of those that the optimizer does not have, too
                    p.grad = None if s.set_to_none or p.grad is None else p.grad.zero_()
        mine = window[rank * own : (rank + 1) * own]
        for a, micro_batch in enumerate(mine):
            x, y = s.data(micro_batch)
            if s.sized and not s.auto and controller.micro_batch is not None:
                controller.micro_batch = micro_batch.size
            with _synchronised(model, s.sync_every or a == own - 1):
                loss = (model(x.to(s.dtype), micro_batch.use_branch) - y.to(s.dtype)).square().mean()
                bad = math.nan if number in s.bad and a == 0 else 1.0
                if s.together:
                    with controller.together():
                        (0.3 * loss * bad / divisor).backward(retain_graph=True)
                        (0.7 * loss * bad / divisor).backward()
                else:
                    (loss * bad / divisor).backward()
        if s.peeked:
            controller.peek()
        if (s.clip and s.mean_first) or s.clamp:
            controller.mean_gradients()
        if s.clamp:
            for p in net.parameters():
                if p.grad is not None:
                    p.grad.data.clamp_(-s.clamp, s.clamp)
        if s.clip:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], s.clip)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The gradients were changed")  # a clip of a sum, on purpose
            optimizer.step()
        optimizer.zero_grad(set_to_none=s.set_to_none)
        line = records[-1] if records else {}  # rank 0 alone writes
        if number in s.bad:
            assert controller.skipped == sum(i <= number for i in s.bad)
            continue
        lines.append(
            {
                "scale": controller.scale,
                "gain": controller.gain,
                "factor": controller.lr_factor,
                "iterations": controller.iterations,
                "tau": controller.tau,
                **inside[-1],
                "raw": [line.get(f"anybatch/raw_{moment}", math.nan) for moment in ("variance", "sqnorm")],
                "average": [controller.variance, controller.sqnorm],
            }
        )
    restored = [float(g["lr"]) for g in optimizer.param_groups]
    weights = {name: _whole(p).detach().double() for name, p in net.named_parameters()}
    controller.detach()
    folder.cleanup()
    return {"lines": lines, "weights": weights, "lr after": restored, "first rank": rank == 0}


@contextlib.contextmanager
def _synchronised(model, synchronised):
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(synchronised)
    with contextlib.nullcontext() if synchronised or not hasattr(model, "no_sync") else model.no_sync():
        yield


def _whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


# ---- the comparison ----

TOLERANCE = {True: 1e-11, False: 1e-3}  # float64 and float32


def check(found, expected, scenario, record_property):
    """Assert that the run is the plain loop's, and leave the worst relative error for the summary of the tests."""
    errors = errors_of(found, expected, scenario)
    worst = max(errors.values())
    record_property(f"worst relative error of random trainings, {scenario.dtype}", worst)
    assert worst < TOLERANCE[scenario.double], errors


def errors_of(found, expected, scenario):
    """The largest error of each kind of number, relative to its size: moments to that of the two together, learning
    rates to the base rate, weights to the largest of their tensor. Asserts that the same things are known.
    """
    errors = {}

    def compare(name, a, b, unit):
        assert math.isnan(a) == math.isnan(b), (name, a, b)
        if not math.isnan(a):
            errors[name] = max(errors.get(name, 0.0), abs(a - b) / unit if a != b else 0.0)

    for mine, right in zip(found["lines"], expected["lines"], strict=True):
        for name in ("scale", "gain", "factor", "iterations", "tau"):
            compare(name, mine[name], right[name], abs(right[name]))
        for name in ("lr", "momentum", "weight decay"):
            for a, b, group in zip(mine[name], right[name], scenario.groups, strict=True):
                compare(name, a, b, group["lr"] if name == "lr" else 1.0)
        for name in ("average", "raw") if found["first rank"] else ("average",):
            for a, b in zip(mine[name], right[name], strict=True):
                compare(name, a, b, sum(map(abs, right[name])) or 1.0)
    for a, b, group in zip(found["lr after"], expected["lr after"], scenario.groups, strict=True):
        compare("lr after", a, b, group["lr"])
    assert found["weights"].keys() == expected["weights"].keys()
    for name, right in expected["weights"].items():
        compare("weights", float((found["weights"][name] - right).abs().max()), 0.0, float(right.abs().max()))
    return errors
