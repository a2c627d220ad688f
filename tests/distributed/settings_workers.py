"""Two ranks of which the second was given something else."""

import tempfile
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import lr_scheduler

import anybatch

SIZES = {"base_batch": 8, "micro_batch": 8}
NO_SIZES = dict.fromkeys(SIZES)

# By the name of a field of Settings, or of what it holds: what each of the two ranks is given.
FIELDS = {
    "rule": ({"rule": anybatch.AdaScale()}, {"rule": anybatch.AdaScale(smoothing=0.5)}),
    "base_batch": ({}, {"base_batch": 16}),
    "scale": ({**NO_SIZES, "scale": 2}, {**NO_SIZES, "scale": 4}),
    "examples": ({"examples": 100}, {"examples": 200}),
    "total": ({"total": 20}, {"total": 21}),
    "schedule_every": ({"schedule_every": 1}, {"schedule_every": 2}),
    "reduction": ({}, {"reduction": "sum"}),
    "grad_scaler": ({"grad_scaler": torch.amp.GradScaler("cpu")}, {}),
}  # fmt: skip

# The groups of an optimizer: of each class all numbers in turn.
OPTIMIZERS = {
    "SGD": {"lr": (0.1, 0.2), "momentum": (0.9, 0.0), "weight_decay": (0.0, 0.1), "nesterov": (True, False)},
    "AdamW": {"betas": ((0.9, 0.99), (0.9, 0.999)), "eps": (1e-8, 1e-6), "amsgrad": (True, False)},
}
SCHEDULERS = {
    "T_max": lambda o, rank: lr_scheduler.CosineAnnealingLR(o, T_max=20 + rank),
    "gamma": lambda o, rank: lr_scheduler.StepLR(o, step_size=5, gamma=(0.1, 0.2)[rank]),
    "step_size": lambda o, rank: lr_scheduler.StepLR(o, step_size=5 + rank),
    "milestones": lambda o, rank: lr_scheduler.MultiStepLR(o, [3, 5 + rank]),
    "_milestones": lambda o, rank: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ConstantLR(o)], [5 + rank]
    ),
}


def error_of(function):
    try:
        function()
    except anybatch.AnybatchError as error:
        return str(error)
    return "no error"


def attached(optimizer, model, **options):
    return anybatch.attach(optimizer, model=model, **{**SIZES, "total": 20, **options})


def sgd(model, **values):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **values})


def differ(rank):
    """The error of each setting that differs."""
    found = {}
    model = DDP(torch.nn.Linear(4, 1))
    for name, options in FIELDS.items():
        found[name] = error_of(lambda: attached(sgd(model), model, **options[rank]))
    for cls, entries in OPTIMIZERS.items():
        for name, values in entries.items():
            optimizer = getattr(torch.optim, cls)(
                model.parameters(), **{**({"momentum": 0.9} if cls == "SGD" else {}), name: values[rank]}
            )
            found[cls, name] = error_of(lambda: attached(optimizer, model))
    for name, make in SCHEDULERS.items():
        optimizer = sgd(model)
        found["scheduler", name] = error_of(lambda: attached(optimizer, model, scheduler=make(optimizer, rank)))
    record = [anybatch.RunRecord(Path(tempfile.mkdtemp()) / "run.jsonl", per_layer=2)] if rank else None
    found["record"] = error_of(lambda: attached(sgd(model), model, record=record))
    return found


def drift(rank):
    """The error of a step on ranks that were given the same, after one of them has changed something."""
    found = {}
    changes = {
        "learning rate": lambda o, s: o.param_groups[0].update(lr=0.3),
        "position of the schedule": lambda o, s: s.step(),
    }
    for name, change in changes.items():
        model = DDP(torch.nn.Linear(4, 1))
        optimizer = sgd(model)
        scheduler = lr_scheduler.ConstantLR(optimizer, factor=1.0)
        controller = attached(optimizer, model, scheduler=scheduler)

        def step():
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        if rank:
            change(optimizer, scheduler)
            if name.startswith("position"):
                controller._drivers[0]._at += 1
        found[name] = error_of(step)
        controller.detach()
    return found


def same(rank):
    """No error: a record on the first rank alone, by layer; what is the same on both."""
    model = DDP(torch.nn.Linear(4, 1))
    record = anybatch.RunRecord(Path(tempfile.mkdtemp()) / "run.jsonl", per_layer=2) if rank == 0 else None
    optimizer = sgd(model)
    controller = attached(optimizer, model, record=record)
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return controller.steps, [] if record is None else [
        bool(s.per_layer) for s in anybatch.read_record(record.path).steps
    ]
