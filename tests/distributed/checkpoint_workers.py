"""What the processes of test_checkpoint.py do. In a module of its own, so that spawned processes can import it."""

import contextlib
import io
from unittest import mock

import oracle
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import attach_task
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel as DDP

import anybatch

SAMPLE = 2.0  # base batches in a micro-batch: on one rank, one backward is scale 2, and shows no noise
SAVED_STEPS = 3


class Run:
    """The oracle's task under DDP; micro-batch `a` of rank `r` is number `r * accumulation + a`."""

    def __init__(self, rank, *, seed=0):
        self.rank = rank
        self.model = DDP(oracle.make_model(seed))
        self.optimizer, self.controller = attach_task(self.model, sample=SAMPLE)
        self.scheduler = self.controller._drivers[0].scheduler

    def step(self, t, accumulation=1):
        for a in range(accumulation):
            x, y = oracle.micro_batch(t, self.rank * accumulation + a)
            with contextlib.nullcontext() if a == accumulation - 1 else self.model.no_sync():
                (oracle.loss_fn(self.model(x), y) / accumulation).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self, *, flat=False):
        """All that is saved; the scheduler and the controller save and load themselves, as dcp's `Stateful`."""
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options),
            "scheduler": self.scheduler,
            "controller": self.controller,
        }

    def save(self, path, *, flat=False):
        dcp.save(self.parts(flat=flat), checkpoint_id=path)

    def load(self, path, *, flat=False):
        parts = self.parts(flat=flat)
        dcp.load(parts, checkpoint_id=path)
        set_model_state_dict(self.model, parts["model"])
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        set_optimizer_state_dict(self.model, self.optimizer, parts["optimizer"], options=options)

    def numbers(self):
        """Everything that a resumed run must have, as tensors and numbers."""
        return {
            "weights": [p.detach().clone() for p in self.model.parameters()],
            "momenta": [self.optimizer.state[p]["momentum_buffer"].clone() for p in self.model.parameters()],
            "scheduler": self.scheduler.state_dict(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "controller": self.controller.state_dict(),
        }

    def end(self):
        """The numbers; what is left of the run then goes with it. Hooks that stay keep the process group, and a process
        that exits while its group's threads run is aborted now and then."""
        numbers = self.numbers()
        self.controller.detach()
        return numbers


def save(rank, path):
    """Train a few steps and save; returns what was saved."""
    run = Run(rank)
    for t in range(SAVED_STEPS):
        run.step(t)
    run.save(path)
    return run.end()


def load(rank, world, path):
    """Load at another world size, and take one step: the loaded numbers, and what the step's plain loop comes to."""
    run = Run(rank, seed=1)
    run.load(path)
    loaded = run.numbers()
    raw = _raw_moments(run.model.module, world)
    run.step(SAVED_STEPS)
    names = ("scale", "gain", "variance", "sqnorm", "tau", "steps")
    step = {name: getattr(run.controller, name) for name in names}
    run.end()
    return loaded, raw, step


def _raw_moments(net, world):
    """Variance and squared mean of the coming step's gradients, one after the other on this process alone."""
    gradients = []
    for index in range(world):
        x, y = oracle.micro_batch(SAVED_STEPS, index)
        gradients.append(torch.autograd.grad(oracle.loss_fn(net(x), y), list(net.parameters())))
    if world == 1:
        return None
    mean = [sum(parts) / world for parts in zip(*gradients)]
    deviation = sum(oracle.norm2([a - b for a, b in zip(g, mean)]) for g in gradients) / (world - 1)
    return SAMPLE * deviation, oracle.norm2(mean) - deviation / world


def resume(rank, path, resumes, steps, accumulations, flat):
    """Train; before each step of `resumes` save, and go on with fresh objects that have loaded it."""
    run = Run(rank)
    for t in range(steps):
        if t in resumes:
            run.save(f"{path}/{t}", flat=flat)
            run.end()
            run = Run(rank, seed=100 + t)
            run.load(f"{path}/{t}", flat=flat)
        run.step(t, accumulations[t % len(accumulations)])
    return run.end()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), weight_decay=0.1),
}


def phantom_steps(rank):
    """What get_ and set_optimizer_state_dict, which call `step()` at a rate of zero, leave of each optimizer's run."""
    outcome = {}
    for name, make in OPTIMIZERS.items():
        for flat in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            model = DDP(oracle.make_model())
            optimizer = make(model.parameters())
            controller = anybatch.attach(optimizer, model=model, scale="count")
            moved = []
            controller.clock.subscribe(moved.append)

            def look():
                state = [p.detach().clone() for p in model.parameters()]
                return controller.state_dict(), state, float(optimizer.param_groups[0]["lr"]), len(moved)

            looks = []
            for t in range(2):
                before = look()
                state = get_optimizer_state_dict(model, optimizer, options=options)
                got = look()
                set_optimizer_state_dict(model, optimizer, state, options=options)
                looks.append((before, got, look()))
                x, y = oracle.micro_batch(t, rank)
                oracle.loss_fn(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            if rank == 0:  # as trainers do that save on one rank: a collective in it would never end
                before = look()
                with mock.patch.object(dist, "all_reduce", side_effect=AssertionError("a collective on one rank")):
                    get_optimizer_state_dict(model, optimizer, options=options)
                looks.append((before, look(), look()))
            outcome[f"{name}, {'flat' if flat else 'nested'}"] = looks, controller.steps, len(moved)
            controller.detach()
            dist.barrier()
    return outcome


def stateful(rank, path):
    """The state as a plain dictionary through dcp; a fresh state without one of the names, and through torch.save."""
    run = Run(rank)
    for t in range(3):
        run.step(t)
    state = run.controller.state_dict()
    dcp.save({"controller": state}, checkpoint_id=path)
    other = Run(rank, seed=1)
    loaded = {"controller": other.controller.state_dict()}
    assert loaded["controller"] != state
    dcp.load(loaded, checkpoint_id=path)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    run.end()
    other.controller.detach()
    return state, loaded["controller"], torch.load(file, weights_only=True)
