"""Training loops of Fabric, on one process or several. In a module of its own, so that processes can import it."""

import oracle
from lightning.fabric import Fabric

import anybatch
from integrations import task


def prepared(rank, world, *, around=True, logger=None):
    """A fabric and what it has set up, with a controller."""
    task.as_launched(rank, world)
    fabric = Fabric(accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", loggers=logger)
    fabric.launch()
    model = oracle.make_model()
    bare = task.optimizer_of(model)
    model, optimizer = fabric.setup(model, bare)
    scheduler = task.scheduler_of(optimizer if around else bare)
    controller = anybatch.attach(
        optimizer, model=model, scheduler=scheduler, total=task.TOTAL, base_batch=task.SIZE, micro_batch="auto",
        record=None if logger is None else fabric.log_dict,
    )  # fmt: skip
    return fabric, model, optimizer, scheduler, controller


def train(parts, rank, world, *, accumulation, clip=None, steps=None, first=0):
    fabric, model, optimizer, _, controller = parts
    trace = task.Trace(controller)
    loader = fabric.setup_dataloaders(task.loader(rank, world, first=first), use_distributed_sampler=False)
    for i, (x, y) in enumerate(controller.batches(loader), 1):
        stepping = i % accumulation == 0
        with fabric.no_backward_sync(model, enabled=not stepping):
            fabric.backward(oracle.loss_fn(model(x), y) / accumulation)
        if stepping:
            if clip is not None:
                fabric.clip_gradients(model, optimizer, max_norm=clip)
            optimizer.step()
            optimizer.zero_grad()
        if controller.steps == steps:
            break
    return task.outcome(trace, model, optimizer)


def parity(rank=0, world=1, *, clip=None, **options):
    parts = prepared(rank, world, **options)
    return train(parts, rank, world, accumulation=task.MICRO_BATCHES // world, clip=clip)


def _state(parts):
    return dict(zip(("model", "optimizer", "scheduler"), parts[1:4], strict=True))


def killed(folder):
    """The first steps, of two micro-batches on one process, and a checkpoint."""
    parts = prepared(0, 1)
    found = train(parts, 0, 1, accumulation=2, steps=task.KILLED)
    parts[0].save(folder / "checkpoint", _state(parts))
    return found


def resumed(rank, world, folder):
    """From the checkpoint to the end, two micro-batches on each process, with the data not seen yet."""
    parts = prepared(rank, world)
    parts[0].load(folder / "checkpoint", _state(parts))
    first = parts[-1].tau
    return {**train(parts, rank, world, accumulation=2, first=task.SEEN), "first": first}


def all_of(rank, world, folder):
    """Everything that two processes are asked."""
    return {
        "parity": parity(rank, world),
        "clipped": parity(rank, world, clip=0.5, around=False),
        "resumed": resumed(rank, world, folder),
    }
