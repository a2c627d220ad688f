"""A trial: the user's step called a few times on copies, and the measurements of its hooks."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch._controller import Controller, attach
from anybatch._errors import AnybatchError, AnybatchWarning

# The body of a training loop, as a function of a model, its optimizer or a list of them, the controller and a batch.
Step = Callable[[Any, Any, Controller, Any], object]


@dataclass
class Trial:
    """Measurements of some calls of a step; lists have an entry for each call."""

    scales: list[float] = field(default_factory=list)  # the scale of the step, as the controller counted it
    backwards: list[int] = field(default_factory=list)  # additions to a parameter's gradient, the most of all
    forwards: list[int] = field(default_factory=list)  # calls of the model with gradients
    steps: list[int] = field(default_factory=list)  # calls of the first optimizer's step(), unless the call raised
    dirty: list[bool] = field(default_factory=list)  # the first backward found a gradient of an earlier step
    cleared: list[bool] = field(default_factory=list)  # the step found no gradient, after a backward
    gradient: dict[str, Tensor] = field(default_factory=dict)  # .grad after the last backward of call 1, unclipped
    warned: list[str] = field(default_factory=list)  # warnings and errors of the library, each once


def run(
    step: Step,
    batch: Any,
    *,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    scheduler: Any,
    options: Mapping[str, Any],
    calls: int,
) -> Trial:
    """Call `step` on copies of model, optimizer and scheduler under a controller, always from the same seed."""
    model, optimizer, scheduler = deepcopy((model, optimizer, scheduler))
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    trial = Trial()
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices):
        warnings.simplefilter("always")
        torch.manual_seed(0)
        try:
            controller = attach(optimizer, model=model, scheduler=scheduler, **options)
            controller._run.ending.drop()
            for call in range(calls):
                hooks = _hooks(trial, model, optimizers, first=call == 0)
                try:
                    step(model, optimizer, controller, batch)
                except AnybatchError:
                    trial.steps.pop()
                    raise
                finally:
                    for hook in hooks:
                        hook.remove()
                trial.scales.append(controller.scale)
            controller.detach()
        except AnybatchError as error:
            trial.warned.append(str(error))
    texts = [str(each.message) for each in caught if issubclass(each.category, AnybatchWarning)]
    trial.warned = list(dict.fromkeys([*texts, *trial.warned]))
    return trial


def _hooks(trial: Trial, model: nn.Module, optimizers: Sequence[Optimizer], *, first: bool) -> list[Any]:
    """Add the entries of one call to `trial`, and the hooks that fill them."""
    for entries in (trial.backwards, trial.forwards, trial.steps):
        entries.append(0)
    trial.dirty.append(False)
    trial.cleared.append(False)
    counts: dict[str, int] = {}

    def forward(*_: Any) -> None:
        trial.forwards[-1] += torch.is_grad_enabled()

    def stepped(optimizer: Optimizer, *_: Any) -> None:
        trial.steps[-1] += optimizer is optimizers[0]
        if counts and not any(_filled(p) for p in model.parameters()):
            trial.cleared[-1] = True

    def on(name: str, p: nn.Parameter) -> list[Any]:
        def before(_: Tensor) -> None:
            if name not in counts and _filled(p):
                trial.dirty[-1] = True

        def after(p: Tensor) -> None:
            counts[name] = counts.get(name, 0) + 1
            trial.backwards[-1] = max(counts.values())
            if first and p.grad is not None:
                trial.gradient[name] = p.grad.detach().to("cpu", torch.float64, copy=True)

        return [p.register_hook(before), p.register_post_accumulate_grad_hook(after)]

    hooks = [each for name, p in model.named_parameters() if p.requires_grad for each in on(name, p)]
    hooks += [model.register_forward_pre_hook(forward)]
    return hooks + [each.register_step_pre_hook(stepped) for each in optimizers]


def _filled(p: Tensor) -> bool:
    return p.grad is not None and bool(p.grad.count_nonzero())
