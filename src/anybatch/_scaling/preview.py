"""The learning rates of a schedule at chosen steps, from a copy of the scheduler.

The copy changes a stand-in optimizer, so the scheduler, its optimizer and the optimizer's groups stay unchanged.
"""

import copy
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import inf, prod
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as ls

Rates = list[float]

# The most scheduler steps times groups of a copy: one takes 5 to 15 µs, so all of them about a second.
_AFFORDABLE = 100_000


def preview(
    scheduler: Any, steps: Sequence[int], *, optimizer: Optimizer, jump: str | None = None
) -> list[tuple[int, Rates]] | None:
    """Each of the ascending `steps` with every group's learning rate at that step; `None` where these are unknown.

    Classes of torch's with a closed form are evaluated at each step. Others are stepped up to the last one, if their
    `step` is torch's own and the work is bounded. Steps before the scheduler's position are then left out.

    Args:
        scheduler: the real one, unwrapped.
        steps: scheduler steps, not negative.
        optimizer: the optimizer of the scheduler.
        jump: the name of a method that sets the scheduler to a step, which timm's schedulers have.
    """
    if not isinstance(getattr(scheduler, "optimizer", None), Optimizer | None) or not steps:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the order of steps, which concerns the real ones
            stand_in = _stand_in(optimizer)
            memo: dict[int, Any] = {id(optimizer): stand_in, id(optimizer.param_groups): stand_in.param_groups}
            memo |= {id(real): new for real, new in zip(optimizer.param_groups, stand_in.param_groups, strict=True)}
            memo[id(getattr(scheduler, "optimizer", optimizer))] = stand_in  # a wrapper of it, perhaps
            return list(_rates(_copied(scheduler, memo), steps, stand_in, jump)) or None
    except Exception:  # a user's schedule may fail beyond its end: then its rates are unknown
        return None


def position_of(scheduler: Any) -> int | None:
    """The number of times that a scheduler was stepped; `None` where it has no `last_epoch`."""
    if isinstance(scheduler, ls.ChainedScheduler):
        return position_of(scheduler._schedulers[0])
    position = getattr(scheduler, "last_epoch", None)
    return position if isinstance(position, int) else None


def last_index(scheduler: Any) -> float:
    """The last step of a scheduler: OneCycleLR raises beyond its end."""
    if isinstance(scheduler, ls.OneCycleLR):
        return scheduler.total_steps - 1
    if isinstance(scheduler, ls.ChainedScheduler):
        return min(last_index(inner) for inner in scheduler._schedulers)
    if isinstance(scheduler, ls.SequentialLR):
        return scheduler._milestones[-1] + last_index(scheduler._schedulers[-1])
    return inf


def parts_of(scheduler: Any) -> Iterator[Any]:
    """The scheduler and the schedulers inside it."""
    yield scheduler
    if isinstance(scheduler, ls.ChainedScheduler | ls.SequentialLR):
        for part in scheduler._schedulers:
            yield from parts_of(part)


# ---- the copy ----


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer of empty parameters with the same values in its groups."""
    empty = [torch.zeros(0, requires_grad=True) for _ in optimizer.param_groups]
    made = torch.optim.SGD([{"params": [p]} for p in empty], lr=0.0)
    made.defaults = dict(optimizer.defaults)
    for group, real in zip(made.param_groups, optimizer.param_groups, strict=True):
        group |= {name: _copied(value, {}) for name, value in real.items() if name != "params"}
    return made


def _copied(thing: Any, memo: dict[int, Any]) -> Any:
    """A copy of numbers, containers, schedulers and callable objects; anything else is shared.

    `copy.deepcopy` would also copy the model, where a lambda is a method of an object that holds it.
    """
    if id(thing) in memo:
        return memo[id(thing)]
    new: Any = thing
    if isinstance(thing, Tensor):
        new = thing.detach().clone() if thing.numel() == 1 else thing
    elif isinstance(thing, Optimizer):
        new = _stand_in(thing)
    elif isinstance(thing, MethodType):
        return MethodType(thing.__func__, memo.get(id(thing.__self__), thing.__self__))
    elif isinstance(thing, tuple) and type(thing) is tuple:
        return tuple(_copied(each, memo) for each in thing)
    elif isinstance(thing, list | deque):
        new = memo[id(thing)] = copy.copy(thing)
        new[:] = [_copied(each, memo) for each in thing] if isinstance(thing, list) else new
    elif isinstance(thing, dict):
        new = memo[id(thing)] = copy.copy(thing)
        for name, value in thing.items():
            new[name] = _copied(value, memo)
    elif _changes(thing):
        new = memo[id(thing)] = copy.copy(thing)
        for name, value in vars(thing).items():
            vars(new)[name] = _copied(value, memo)
    memo[id(thing)] = new
    return new


def _changes(thing: Any) -> bool:
    """Whether `thing` may change when a scheduler is stepped: a scheduler, or a function with a state."""
    if isinstance(thing, type | FunctionType | nn.Module) or not hasattr(thing, "__dict__"):
        return False
    return callable(thing) or callable(getattr(thing, "step", None))


# ---- its rates ----


def _rates(scheduler: Any, steps: Sequence[int], optimizer: Optimizer, jump: str | None) -> Iterator[tuple[int, Rates]]:
    groups = optimizer.param_groups
    if jump is not None:
        for t in steps:
            getattr(scheduler, jump)(t)
            yield t, [float(group["lr"]) for group in groups]
        return
    closed = _closed_form(scheduler)
    if closed is not None:
        for t in steps:
            yield t, [float(rate) for rate in closed(t)]
        return
    at, last = position_of(scheduler), last_index(scheduler)
    by_torch = all(type(part).step.__module__.startswith("torch.") for part in parts_of(scheduler))
    if at is None or (steps[-1] - at) * len(groups) > _AFFORDABLE or not by_torch:
        return
    for t in [t for t in steps if t >= at]:
        while at < min(t, last):
            scheduler.step()
            at += 1
        yield t, [float(group["lr"]) for group in groups]


def _closed_form(scheduler: Any) -> Callable[[int], Sequence[float | Tensor]] | None:
    """The rates as a function of the step, whatever the steps before it; `None` for a recursion."""
    kind = type(scheduler)
    if kind is ls.LambdaLR:
        return lambda t: [f(t) * base for f, base in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)]
    if kind is ls.SequentialLR:
        parts = [_closed_form(part) for part in scheduler._schedulers]
        return None if None in parts else lambda t: _in_sequence(parts, scheduler._milestones, t)
    if kind is ls.ChainedScheduler and all(type(part) in _FACTORS for part in scheduler._schedulers):
        chained = [(_closed_form(part), part.base_lrs) for part in scheduler._schedulers]
        return lambda t: _product(chained, t)
    if kind in _FORMULAS:
        return lambda t: _at(scheduler, t)
    return None


_FACTORS = (
    ls.StepLR, ls.MultiStepLR, ls.ConstantLR, ls.LinearLR, ls.ExponentialLR, ls.PolynomialLR, ls.CosineAnnealingLR,
)  # fmt: skip
_FORMULAS = (*_FACTORS, ls.OneCycleLR, ls.CyclicLR, ls.CosineAnnealingWarmRestarts)


def _at(scheduler: Any, t: int) -> Sequence[float | Tensor]:
    t = int(min(t, last_index(scheduler)))
    if type(scheduler) is ls.CosineAnnealingWarmRestarts:
        scheduler.step(t)
        return list(scheduler.get_last_lr())
    scheduler.last_epoch = t
    return list(getattr(scheduler, "_get_closed_form_lr", scheduler.get_lr)())


def _in_sequence(parts: Sequence[Any], milestones: Sequence[int], t: int) -> Sequence[float | Tensor]:
    index = bisect_right(milestones, t)
    return list(parts[index](t - (milestones[index - 1] if index else 0)))


def _product(chained: Sequence[tuple[Any, Sequence[Any]]], t: int) -> Sequence[float | Tensor]:
    """The rates of a chain of factors; a cosine's lowest rate counts as a part of its factor."""
    bases = chained[0][1]
    factors = [
        [float(rate) / float(base) if base else 0.0 for rate, base in zip(form(t), its, strict=True)]
        for form, its in chained
    ]
    return [float(base) * prod(column) for base, column in zip(bases, zip(*factors, strict=True), strict=True)]
