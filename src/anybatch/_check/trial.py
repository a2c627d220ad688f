"""A trial: the user's step called a few times on copies, and what its hooks saw."""

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
    """What was seen of some calls of a step; lists have an entry for each call.

    Args:
        scales: what the controller counted as the scale of the step.
        backwards: how often the gradient of the parameter that got most was added to.
        forwards: how often the model was called with gradients.
        steps: how often `optimizer.step()`, of several the first one's, was called; of calls that came to their end.
        dirty: whether a gradient of an earlier step was there at the first backward.
        cleared: whether there was a backward and yet no gradient at the step.
        gradient: `.grad` of all parameters after the last backward of the first call, before any clipping; float64.
        said: what the library warned of or raised, each once.
    """

    scales: list[float] = field(default_factory=list)
    backwards: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    dirty: list[bool] = field(default_factory=list)
    cleared: list[bool] = field(default_factory=list)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


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
    """Call `step` on copies of model, optimizer and scheduler, which are under a controller; from one seed."""
    model, optimizer, scheduler = deepcopy((model, optimizer, scheduler))
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    seen = Trial()
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices):
        warnings.simplefilter("always")
        torch.manual_seed(0)
        try:
            controller = attach(optimizer, model=model, scheduler=scheduler, **options)
            for call in range(calls):
                hooks = _watch(seen, model, optimizers, first=call == 0)
                try:
                    step(model, optimizer, controller, batch)
                except AnybatchError:
                    seen.steps.pop()
                    raise
                finally:
                    for hook in hooks:
                        hook.remove()
                seen.scales.append(controller.scale)
            controller.detach()
        except AnybatchError as error:
            seen.said.append(str(error))
    told = [str(each.message) for each in caught if issubclass(each.category, AnybatchWarning)]
    seen.said = list(dict.fromkeys([*told, *seen.said]))
    return seen


def _watch(seen: Trial, model: nn.Module, optimizers: Sequence[Optimizer], *, first: bool) -> list[Any]:
    """Put hooks for one call, whose entries begin at nothing."""
    for entries in (seen.backwards, seen.forwards, seen.steps):
        entries.append(0)
    seen.dirty.append(False)
    seen.cleared.append(False)
    counts: dict[str, int] = {}

    def forward(*_: Any) -> None:
        seen.forwards[-1] += torch.is_grad_enabled()

    def stepped(of: Optimizer, *_: Any) -> None:
        seen.steps[-1] += of is optimizers[0]
        if counts and not any(_filled(p) for p in model.parameters()):
            seen.cleared[-1] = True

    def watch(name: str, p: nn.Parameter) -> list[Any]:
        def before(_: Tensor) -> None:
            if name not in counts and _filled(p):
                seen.dirty[-1] = True

        def after(p: Tensor) -> None:
            counts[name] = counts.get(name, 0) + 1
            seen.backwards[-1] = max(counts.values())
            if first and p.grad is not None:
                seen.gradient[name] = p.grad.detach().to("cpu", torch.float64, copy=True)

        return [p.register_hook(before), p.register_post_accumulate_grad_hook(after)]

    hooks = [each for name, p in model.named_parameters() if p.requires_grad for each in watch(name, p)]
    hooks += [model.register_forward_pre_hook(forward)]
    return hooks + [each.register_step_pre_hook(stepped) for each in optimizers]


def _filled(p: Tensor) -> bool:
    return p.grad is not None and bool(p.grad.count_nonzero())
