"""Training loops of Accelerate, on one process or several. In a module of its own, so that processes can import it."""

import oracle
import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader, TensorDataset

import anybatch
from integrations import task


def shard(accelerator):
    """FSDP2 on processes without a device: Accelerate has it all but the choice, which it makes for devices only."""
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, cpu_ram_efficient_loading=False
    )


def prepared(
    *,
    accumulation,
    total=task.TOTAL,
    around=False,
    loader=None,
    tracker=None,
    sharded=False,
    precision=None,
    scaler=None,
):
    """An accelerator and what it has prepared, with a controller; the loader is sharded by Accelerate."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    cpu = precision != "fp16"
    accelerator = Accelerator(
        cpu=cpu, gradient_accumulation_steps=accumulation, log_with=tracker, mixed_precision=precision
    )
    accelerator.scaler = scaler or accelerator.scaler
    accelerator.init_trackers("run")
    if sharded:
        shard(accelerator)
    model = oracle.make_model()
    if precision is not None:
        model, loader = model.float(), DataLoader(task.singles(), batch_size=task.SIZE)
    optimizer = task.optimizer_of(model)
    scheduler = None if around else task.scheduler_of(optimizer, total)
    loader = loader or DataLoader(task.examples(), batch_size=task.SIZE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = task.scheduler_of(optimizer, total) if around else accelerator.prepare(scheduler)
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, total=total, base_batch=task.SIZE, micro_batch=task.SIZE,
        reduction=accumulation, record=None if tracker is None else accelerator.log, grad_scaler=accelerator.scaler,
    )  # fmt: skip
    return accelerator, model, optimizer, loader, scheduler, controller


def train(accelerator, model, optimizer, loader, scheduler, controller, *, clip=None, steps=None):
    """Until the run is over or has come to so many steps; `scheduler.step()` stays where it is without anybatch."""
    trace = task.Trace(controller)
    for x, y in controller.batches(loader):
        with accelerator.accumulate(model):
            accelerator.backward(oracle.loss_fn(model(x), y))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if hasattr(scheduler, "scheduler"):
                scheduler.step()
            optimizer.zero_grad()
        if controller.steps == steps:
            break
    return task.outcome(trace, model, optimizer)


def parity(rank=0, world=1, *, clip=None, **options):
    task.as_launched(rank, world)
    return train(*prepared(accumulation=task.MICRO_BATCHES // world, **options), clip=clip)


def end_of_400(rank, world):
    """One backward a step, so that the scale is the number of processes."""
    task.as_launched(rank, world)
    parts = prepared(accumulation=1, total=400)
    return train(*parts)


def unprepared(rank, world):
    """What attach says of the model as it was before `prepare`."""
    task.as_launched(rank, world)
    _, model, optimizer, *_, controller = prepared(accumulation=1)
    controller.detach()
    with pytest.raises(anybatch.UsageError) as said:
        anybatch.attach(optimizer, model=model.module, scale="count")
    return str(said.value)


def killed(rank, world, folder, accumulation=2, **options):
    """The first steps, and a checkpoint."""
    task.as_launched(rank, world)
    parts = prepared(accumulation=accumulation, **options)
    found = train(*parts, steps=task.KILLED)
    parts[0].save_state(folder)
    return {**found, "rate": parts[2].param_groups[0]["lr"]}


def resumed(rank, world, folder, accumulation, **options):
    """From the checkpoint to the end, with the data that the killed run has not seen."""
    task.as_launched(rank, world)
    rest = DataLoader(TensorDataset(*task.examples()[task.SIZE * task.SEEN :]), batch_size=task.SIZE)
    parts = prepared(accumulation=accumulation, loader=rest, **options)
    parts[0].load_state(folder)
    parts[0].step = 0  # the saved count of backwards comes back on ranks that were there when it was saved
    controller = parts[-1]
    first, rate = controller.tau, parts[2].param_groups[0]["lr"]
    return {**train(*parts), "first": first, "rate": rate}


def whole(found):
    """With the weights gathered, as each rank has a shard of them."""
    return {**found, "weights": [p.full_tensor() for p in found["weights"]]}


def all_of(rank, world, folder):
    """Everything that two processes are asked."""
    torch.manual_seed(0)
    return {
        "parity": parity(rank, world),
        "clipped": parity(rank, world, clip=0.5),
        "around": parity(rank, world, around=True),
        "end": end_of_400(rank, world),
        "unprepared": unprepared(rank, world),
        "resumed": resumed(rank, world, folder, 2),
        "sharded": whole(parity(rank, world, sharded=True)),
        "sharded, killed": whole(killed(rank, world, folder / "shards", 1, sharded=True)),
        "sharded, resumed": whole(resumed(rank, world, folder / "shards", 2, sharded=True)),
    }
