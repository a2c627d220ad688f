"""The optimizer or the scheduler inside a framework's wrapper.

Wrappers are recognised by their attributes or by the name of their class, so that no framework is imported.
"""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


class HeldScheduler:
    """A scheduler for a framework: its `step()` does nothing, and everything else is the real scheduler's.

    A controller steps the real scheduler to `floor(tau)`; a framework that steps it as well would step it twice. Give
    this one to the framework instead, which saves, loads and reads the learning rate as before.
    `attach(scheduler=...)` accepts either. Until `detach()`, `attach` also puts this into a wrapper that has a
    `scheduler` (Accelerate's `AcceleratedScheduler`, Lightning's `LRSchedulerConfig`).

    Args:
        scheduler: the real one.

    Example:
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(4, 1).parameters(), lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        >>> held = anybatch.HeldScheduler(scheduler)
        >>> held.step()
        >>> held.last_epoch, held.get_last_lr(), held.state_dict() == scheduler.state_dict()
        (0, [0.1], True)
    """

    def __init__(self, scheduler: Any) -> None:
        self.__dict__["scheduler"] = scheduler.scheduler if isinstance(scheduler, HeldScheduler) else scheduler

    def step(self, *_: Any, **__: Any) -> None:
        """Do nothing: the clock steps the scheduler."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["scheduler"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:  # __getattr__ of an empty copy would fail
        return HeldScheduler, (self.__dict__["scheduler"],)

    def __repr__(self) -> str:
        return f"<HeldScheduler of {self.__dict__['scheduler']!r}>"


def held_by(scheduler: Any) -> tuple[Any, Any]:
    """The real scheduler, and the wrapper that keeps it as `scheduler`; `None` where no wrapper is to be changed."""
    holder = None
    while isinstance(scheduler, HeldScheduler) or _is_wrapper(scheduler):
        # A scheduler that is held already was held before this controller, and stays held after it.
        holder = None if isinstance(scheduler, HeldScheduler) else scheduler
        scheduler = scheduler.scheduler
    return scheduler, holder


def _is_wrapper(thing: Any) -> bool:
    """Whether `thing` is Accelerate's wrapper or Lightning's, which has no step; other wrappers may do more."""
    return hasattr(thing, "scheduler") and (hasattr(thing, "step_with_optimizer") or not hasattr(thing, "step"))


def optimizers_in(given: Any) -> Sequence[Any]:
    """The optimizers of a sequence, of torchtitan's `OptimizersContainer`, or the one that was given.

    The container is an `Optimizer` whose `step()` steps each of its `optimizers`; its own groups have no values.
    DeepSpeed's optimizers are not `Optimizer`s, and have one inside.
    """
    given = _in_deepspeed(given)
    if _is_container(given, "OptimizersContainer", "optimizers"):
        return list(given.optimizers)
    return (given,) if isinstance(given, Optimizer) else given


def schedulers_in(given: Any, *, engine: Any = None) -> Sequence[Any]:
    """The schedulers of a sequence, of torchtitan's `LRSchedulersContainer`, or the one that was given.

    One that DeepSpeed's `engine` steps is given as the engine's attribute.
    """
    if _is_container(given, "LRSchedulersContainer", "schedulers"):
        return [_Place(given.schedulers, index) for index in range(len(given.schedulers))]
    found = given if isinstance(given, list | tuple) else () if given is None else (given,)
    stepped = None if engine is None else held_by(engine.lr_scheduler)[0]
    return [each if stepped is None or held_by(each)[0] is not stepped else _Place(vars(engine)) for each in found]


def _is_container(thing: object, name: str, content: str) -> bool:
    named = any(cls.__name__ == name for cls in type(thing).__mro__)
    return named and isinstance(getattr(thing, content, None), list)


class _Place:
    """A place in a container's list or among an engine's attributes, in the form of a wrapper around one scheduler."""

    def __init__(self, schedulers: Any, index: Any = "lr_scheduler") -> None:
        self._schedulers, self._index = schedulers, index

    @property
    def scheduler(self) -> Any:
        return self._schedulers[self._index]

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._schedulers[self._index] = scheduler


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside the wrapper of Accelerate, Fabric or Lightning, or inside DeepSpeed's in one of them.

    These wrappers share groups and state with their `optimizer`. A wrapper with its own state, such as Lookahead, is
    another optimizer.
    """
    optimizer = _in_deepspeed(optimizer)
    inner = _in_deepspeed(getattr(optimizer, "optimizer", None))
    if not isinstance(inner, Optimizer) or inner is optimizer:
        return optimizer
    shared = inner.param_groups is optimizer.param_groups and inner.state is optimizer.state
    return bare_optimizer(inner) if shared else optimizer


def _in_deepspeed(optimizer: Any) -> Any:
    """The optimizer that one of DeepSpeed's steps; any other object itself."""
    while type(optimizer).__module__.startswith("deepspeed.runtime.") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
