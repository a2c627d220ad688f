"""What the processes of `test_trust` do: each scenario returns what it came to, or its error in words."""

import contextlib
import itertools
import tempfile
import warnings
from pathlib import Path

import oracle
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch


def make(engine, **options):
    model = oracle.make_model()
    if engine == "ddp":
        return DDP(model, **options)
    fully_shard(model[0])
    fully_shard(model[2])
    return fully_shard(model)


def attached(model, *, lr=0.01, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = options if {"base_batch", "scale"} & options.keys() else {"scale": "count"} | options
    return optimizer, anybatch.attach(optimizer, model=model, **options)


@contextlib.contextmanager
def synchronised(model, sync):
    """Whether the gradients of a backward, and its forward, inside are averaged over the ranks."""
    if isinstance(model, DDP):
        with contextlib.nullcontext() if sync else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(sync)
        yield


def backward(model, rank, t, a=0, *, share=1.0, sync=True, size=4):
    x, y = oracle.micro_batch(t, 100 * rank + a, size=size)
    with synchronised(model, sync):
        (oracle.loss_fn(model(x), y) * share).backward()


def window(model, rank, t, accumulation):
    for a in range(accumulation):
        backward(model, rank, t, a, share=1 / accumulation, sync=a == accumulation - 1)


def told(function, *args, **kwargs):
    """What it returns, or its error."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


CLEAR = {
    "to none": lambda optimizer: optimizer.zero_grad(set_to_none=True),
    "to zero": lambda optimizer: optimizer.zero_grad(set_to_none=False),
    "another": lambda optimizer: [setattr(p, "grad", torch.zeros_like(p)) for p in optimizer.param_groups[0]["params"]],
    "behind": lambda optimizer: [p.grad.data.zero_() for p in optimizer.param_groups[0]["params"]],
}


def clearing(rank, engine, options, clear, scenario, accumulation):
    """The counts of five steps."""
    model = make(engine, **options)
    optimizer, controller = attached(model)
    counts = []
    for t in range(5):
        window(model, rank, t, accumulation)
        if scenario == "thrown away" and t in (0, 2):
            CLEAR[clear](optimizer)
            window(model, rank, t, accumulation)
        if scenario != "step skipped" or t not in (0, 2):
            optimizer.step()
            counts.append(controller.count)
        if scenario != "not cleared":
            CLEAR[clear](optimizer)
    return counts


def clearings(rank):
    """Every way to clear gradients, under every engine and option that touches `.grad`."""
    flags = ("gradient_as_bucket_view", "static_graph", "find_unused_parameters")
    engines = [("ddp", dict(zip(flags, on, strict=True))) for on in itertools.product((False, True), repeat=3)]
    found = {}
    for (engine, options), clear in itertools.product([*engines, ("fsdp", {})], CLEAR):
        for scenario in ("train", "thrown away", "step skipped", "not cleared"):
            for accumulation in (1,) if options.get("static_graph") else (1, 2):  # DDP's own condition
                key = engine, tuple(flag for flag, on in options.items() if on), clear, scenario, accumulation
                found[key] = told(clearing, rank, engine, options, clear, scenario, accumulation)
    return found


def examples_of_ranks(rank, shared):
    """The warnings of two steps, and the last gain."""
    model = make("ddp")
    optimizer, controller = attached(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for t in range(2):
            backward(model, 0 if shared else rank, t)
            optimizer.step()
            optimizer.zero_grad()
    return [str(each.message) for each in seen if issubclass(each.category, anybatch.AnybatchWarning)], controller.gain


def empty_micro_batches(rank, sizes, reduction):
    """The scale, the variance and the gradient of a step, each beside that of a plain loop over all ranks' examples."""
    torch.manual_seed(0)
    model = DDP(nn.Linear(3, 1).double())
    rule = anybatch.AdaScale(smoothing=0.0)
    options = {"base_batch": 4, "micro_batch": "auto", "reduction": reduction, "rule": rule}
    optimizer, controller = attached(model, lr=0.0, **options)
    data = [[torch.randn(size, 3, dtype=torch.float64) for size in each] for each in sizes]
    for i, x in enumerate(data[rank]):
        with synchronised(model, i == len(data[rank]) - 1):
            loss = (model(x) - 1).square().sum() / max(len(x), 1)
            (loss / (1 if reduction == "sum" else reduction)).backward()
    optimizer.step()
    full = [x for each in data for x in each if len(x)]
    parameters = list(model.parameters())
    each = [
        torch.cat([g.flatten() for g in torch.autograd.grad((model.module(x) - 1).square().mean(), parameters)])
        for x in full
    ]
    mean, n = torch.stack(each).mean(0), len(each)
    size = n / sum(1 / len(x) for x in full)
    of_mean = (sum(float(g @ g) for g in each) / n - float(mean @ mean)) / max(n - 1, 1)
    found = torch.cat([p.grad.flatten() for p in parameters])
    return (
        (controller.scale, n * size / 4),
        (controller.variance, of_mean * n * size / 4) if n > 1 else (0.0, 0.0),
        (found.tolist(), mean.tolist()),
    )


def hooks_on_one_rank(rank, broken):
    """A hook of the user's from the third step on, on one rank alone, as a tracker's `watch` makes them; with it comes
    perhaps a gradient that is not finite.
    """
    model = make("ddp")
    optimizer, controller = attached(model, total=50)
    samples = []
    for t in range(4):
        if t == 2 and rank == 0:
            for p in model.parameters():
                p.register_hook(lambda grad: None)
        for a in range(2):
            share = torch.inf if broken and (t, a, rank) == (2, 0, 1) else 0.5
            backward(model, rank, t, a, share=share, sync=a == 1)
        optimizer.step()
        optimizer.zero_grad()
        samples.append(controller.state_dict()["samples"])
    return samples, controller.skipped, controller.gain, [p.tolist() for p in model.parameters()]


def errors(rank):
    """What is wrong on one rank is the same error on every rank."""
    found = {}

    def other_setting(**options):
        attached(make("ddp"), **options)

    found["another base batch"] = told(other_setting, base_batch=8 * (1 + rank), micro_batch=8)
    found["another rule"] = told(other_setting, rule=anybatch.AdaScale(smoothing=0.5) if rank else None)
    found["another size"] = told(other_setting, base_batch=8, micro_batch=8 * (1 + rank))

    def state_on_one_rank(**options):
        model = make("ddp")
        optimizer, controller = attached(model, total=50)
        for t in range(2):
            window(model, rank, t, 1)
            optimizer.step()
            optimizer.zero_grad()
        state = controller.state_dict()
        model = make("ddp")
        optimizer, controller = attached(model, total=50, **options)
        if rank == 0:
            controller.load_state_dict(state)
        window(model, rank, 0, 1)
        optimizer.step()

    found["a state on one rank"] = told(state_on_one_rank)
    record = [anybatch.RunRecord(Path(tempfile.mkdtemp()) / "run.jsonl", per_layer=5)] if rank == 0 else []
    found["a state on one rank, by layer"] = told(state_on_one_rank, record=record)

    def never(engine):
        model = make(engine)
        optimizer, _ = attached(model)
        backward(model, rank, 0, sync=False)
        optimizer.step()

    def not_at_last(engine):
        model = make(engine)
        optimizer, _ = attached(model)
        backward(model, rank, 0, 0, share=0.5, sync=True)
        backward(model, rank, 0, 1, share=0.5, sync=False)
        optimizer.step()

    for engine in ("ddp", "fsdp"):
        found[engine, "never synchronised"] = told(never, engine)
        found[engine, "not synchronised at last"] = told(not_at_last, engine)

    def inner():
        model = make("ddp")
        optimizer, _ = attached(model)
        x, y = oracle.micro_batch(0, rank)
        oracle.loss_fn(model.module(x), y).backward()
        optimizer.step()

    def forward_inside():
        model = make("ddp")
        optimizer, _ = attached(model)
        x, y = oracle.micro_batch(0, rank)
        with model.no_sync():
            loss = oracle.loss_fn(model(x), y)
        loss.backward()
        optimizer.step()

    found["the inner module"] = told(inner)
    found["a forward inside of no_sync"] = told(forward_inside)

    def no_backward():
        model = nn.Linear(6, 3, dtype=torch.float64)
        model = DDP(model)
        optimizer, controller = attached(model, scale=4.0)
        optimizer.step()
        return controller.steps, controller.skipped, controller.tau

    found["no backward"] = told(no_backward)
    return found


def together(rank):
    """Two losses with a backward each are one micro-batch; against one backward of their sum."""
    found = []
    for engine in ("ddp", "fsdp"):
        for apart in (False, True):
            model = make(engine)
            optimizer, controller = attached(model, rule=anybatch.AdaScale(smoothing=0.0))
            for t in range(3):
                for a in range(2):
                    with synchronised(model, a == 1):
                        if apart:
                            with controller.together():
                                for b in range(2):
                                    x, y = oracle.micro_batch(t, 100 * rank + 2 * a + b)
                                    (oracle.loss_fn(model(x), y) / 2).backward()
                        else:
                            pairs = [oracle.micro_batch(t, 100 * rank + 2 * a + b) for b in range(2)]
                            x, y = (torch.cat(both) for both in zip(*pairs, strict=True))
                            oracle.loss_fn(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append((engine, controller.count, controller.variance, controller.sqnorm, controller.tau))
    return found
