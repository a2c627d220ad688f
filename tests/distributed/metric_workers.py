"""What the processes of the tests of Adam's metric do."""

import contextlib
import math
import warnings

import metric_oracle
import oracle
import torch
from common import counted_all_reduces
from metric_oracle import BETAS, DECAY, EPS, LR
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch
from distributed.fsdp_workers import shard


def make_model():
    torch.set_default_dtype(torch.float64)  # the type in which Adam counts its steps
    return oracle.make_model()


def attach(model, *, smoothing=None, lr=LR, **options):
    warnings.simplefilter("ignore")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY)
    rule = anybatch.AdaScale(metric="adam", smoothing=smoothing)
    return optimizer, anybatch.attach(optimizer, model=model, scale="count", total=100, rule=rule, **options)


def train(model, batches, *, steps=20, **options):
    """`batches(t)` are the numbers of this rank's micro-batches; gains, and the averages in the metric."""
    optimizer, controller = attach(model, **options)
    found = []
    for t in range(steps):
        mine = batches(t)
        for i in mine:
            last = i == mine[-1] or not isinstance(model, DDP)
            with contextlib.nullcontext() if last else model.no_sync():
                x, y = oracle.micro_batch(t, i)
                (oracle.loss_fn(model(x), y) / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = controller.state_dict()
        weight = state["metric_weight"] or math.nan
        found.append((controller.gain, state["metric_variance"] / weight, state["metric_sqnorm"] / weight))
    return found


def parity(rank, world):
    own = (2 * rank, 2 * rank + 1)
    mesh = init_device_mesh("cpu", (world,))
    results = {
        "DDP": train(DDP(make_model()), lambda _: own),
        # On every rank the same micro-batches: only then is each shard's sum the same.
        "FSDP2": train(shard(make_model(), mesh=mesh), lambda _: (0, 1)),
        "replicas of FSDP2": [],
    }
    if world == 4:
        hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results["replicas of FSDP2"] = train(shard(make_model(), mesh=hybrid), lambda _: (0, 1))
    return results


def unbiased(rank, world):
    """The moments of many steps at weights that stay where they are, by DDP and by shards."""
    own = (2 * rank, 2 * rank + 1)
    mesh = init_device_mesh("cpu", (world,))
    models = DDP(make_model()), shard(make_model(), mesh=mesh)
    return [train(model, lambda _: own, steps=300, lr=1e-9, smoothing=0.99)[-1] for model in models]


def heads(rank, world):
    """A head that one rank alone is the first to use, and the numbers of each step's reduction."""
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(6, 3, dtype=torch.float64) for _ in range(2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = net

        def forward(self, x, head):
            return self.heads[head](x)

    model = DDP(Net(), find_unused_parameters=True)
    optimizer, controller = attach(model)
    known = []
    with counted_all_reduces() as calls:
        for t in range(25):
            x, y = oracle.micro_batch(t, rank)
            oracle.loss_fn(model(x, int(t == 12 and rank == 0)), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            known.append(controller.state_dict()["metric_samples"] > 0)
    return known, calls, controller.gain


def uneven(rank, world):
    """Under Join, rank 0 has three steps more."""
    model = DDP(make_model())
    optimizer, controller = attach(model, smoothing=0.0)
    samples = []
    with Join([model, controller]):
        for t in range(metric_oracle.READY + (4 if rank == 0 else 1)):
            for i in (0, 1):
                with contextlib.nullcontext() if i else model.no_sync():
                    x, y = oracle.micro_batch(t, 2 * rank + i)
                    (oracle.loss_fn(model(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            samples.append((controller.count, controller.state_dict()["metric_samples"]))
    return samples, controller.state_dict()


def refusals(rank, world):
    outcome = {}

    def attempt(name, make):
        try:
            make()
        except anybatch.UnsupportedError as error:
            outcome[name] = str(error)

    def zero():
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = DDP(make_model())
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
        anybatch.attach(optimizer, model=model, scale="count", rule=anybatch.AdaScale(metric="adam"))

    mesh = init_device_mesh("cpu", (world,))

    def columns():
        model = nn.Sequential(nn.Linear(6, 6, bias=False))
        attach(shard(model, mesh=mesh, shard_placement_fn=lambda _: Shard(1)))

    attempt("ZeRO", zero)
    attempt("columns", columns)
    return outcome
