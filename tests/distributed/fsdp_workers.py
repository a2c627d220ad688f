"""What the processes of the FSDP2 tests do."""

import contextlib
import warnings

import oracle
import torch
import torch.distributed as dist
from common import attach_task, counted_all_reduces, run_task
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import anybatch


def shard(model, **options):
    for module in model:
        if isinstance(module, nn.Linear):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def train(rank, model, *, accumulation, steps=13, sample=1.0, sync_every=True, dtype=torch.float64, compiled=False):
    optimizer, controller = attach_task(model, sample=sample)
    forward = torch.compile(model, backend="aot_eager") if compiled else model

    def backward(t, a):
        x, y = oracle.micro_batch(t, rank * accumulation + a, dtype=dtype)
        if not sync_every:
            model.set_requires_gradient_sync(a == accumulation - 1)
        (oracle.loss_fn(forward(x), y) / accumulation).backward()

    result = run_task(optimizer, controller, backward, steps=steps, accumulation=accumulation)
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {**result, "parameters": [p.detach() for p in parameters]}


def parity(rank, world):
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (world,))
    results = {
        f"accumulation {a}": train(rank, shard(oracle.make_model(), mesh=mesh), accumulation=a) for a in (1, 2, 3)
    }
    for a in (2, 3):
        model = shard(oracle.make_model(), mesh=mesh)
        results[f"accumulation {a}, one sync"] = train(rank, model, accumulation=a, sync_every=False)
    results["S != N"] = train(rank, shard(oracle.make_model(), mesh=mesh), accumulation=2, sample=0.25)
    results["no reshard"] = train(
        rank, shard(oracle.make_model(), mesh=mesh, reshard_after_forward=False), accumulation=2
    )
    results["one unit"] = train(rank, fully_shard(oracle.make_model(), mesh=mesh), accumulation=2)
    results["CPU offload"] = train(
        rank, shard(oracle.make_model(), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)), accumulation=2
    )
    if world == 4:
        hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for sync_every in (True, False):
            model = shard(oracle.make_model(), mesh=hybrid)
            name = "HSDP" if sync_every else "HSDP, one sync"
            results[name] = train(rank, model, accumulation=2, sync_every=sync_every)
    return results


def mixed_precision(rank, world):
    """float32 parameters; the parameters' and the reductions' types are the policy's."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (world,))
    results = {}
    for param, reduce in (
        (None, torch.float32),
        (None, torch.bfloat16),
        (None, torch.float16),
        (torch.bfloat16, torch.float32),
    ):
        policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce)
        model = shard(oracle.make_model(dtype=torch.float32), mesh=mesh, mp_policy=policy)
        results[f"{param}, {reduce}"] = train(rank, model, accumulation=2, dtype=torch.float32)["gains"]
    return results


def compiled(rank, world):
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (world,))
    return train(rank, shard(oracle.make_model(), mesh=mesh), accumulation=2, compiled=True)


def single(rank, world):
    """A shard group of one rank."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (world,))
    return train(0, shard(oracle.make_model(), mesh=mesh), accumulation=3)


def replicated(rank, world):
    """`replicate()`, the composable DDP."""
    warnings.simplefilter("ignore")
    from torch.distributed._composable.replicate_with_fsdp import replicate

    mesh = init_device_mesh("cpu", (world,))
    model = oracle.make_model()
    for module in model:
        if isinstance(module, nn.Linear):
            replicate(module, mesh=mesh)
    return train(rank, replicate(model, mesh=mesh), accumulation=2)


def refusals(rank, world):
    warnings.simplefilter("ignore")
    from torch.distributed.fsdp import FullyShardedDataParallel

    outcome = {}

    def attempt(name, make):
        try:
            model = make()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            controller = anybatch.attach(optimizer, model=model, scale="count")
            oracle.loss_fn(model(oracle.micro_batch(0, rank)[0]), 0).backward()
            with contextlib.suppress(ZeroDivisionError):
                optimizer.step()
            outcome[name] = f"ran: {controller.count}"
        except anybatch.AnybatchError as error:
            outcome[name] = f"{type(error).__name__}: {error}"

    mesh = init_device_mesh("cpu", (world,))
    attempt("FSDP1", lambda: FullyShardedDataParallel(oracle.make_model(), device_id=torch.device("cpu")))

    def partly():
        model = oracle.make_model()
        fully_shard(model[0], mesh=mesh)
        return model

    attempt("partly sharded", partly)
    half = init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
    attempt("whole 2-D mesh", lambda: shard(oracle.make_model(), mesh=half))

    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel as DDP

    def power():
        ddp = DDP(oracle.make_model(dtype=torch.float64))
        ddp.register_comm_hook(powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook)
        return ddp

    attempt("PowerSGD", power)

    ddp = DDP(oracle.make_model())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    anybatch.attach(optimizer, model=ddp, scale="count")
    try:
        with ddp.join():
            oracle.loss_fn(ddp(oracle.micro_batch(0, rank)[0]), 0).backward()
            optimizer.step()
    except anybatch.UsageError as error:
        outcome["join"] = str(error)
    dist.barrier()
    return outcome


def collectives(rank, world):
    """All-reduces of one step that anybatch adds to FSDP2's reduce-scatters."""
    warnings.simplefilter("ignore")
    model = shard(oracle.make_model(), mesh=init_device_mesh("cpu", (world,)))
    optimizer, _ = attach_task(model)
    with counted_all_reduces() as calls:
        for t in range(3):
            x, y = oracle.micro_batch(t, rank)
            oracle.loss_fn(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return calls
