"""Wrappers: what frameworks put around an optimizer or a scheduler, and the real one in it.

They are known by their shape, so that no framework is imported.
"""

from typing import Any

from torch.optim import Optimizer

from anybatch._errors import UnsupportedError


class HeldScheduler:
    """A scheduler in a framework's hands: its `step()` does nothing, and everything else is the real scheduler's.

    A controller steps the real one to `floor(tau)`; a framework that steps it as well, once a step or an epoch, would
    move it twice. So the framework is given this in its place: it saves, loads and reads the rate as ever.
    `attach(scheduler=...)` takes the one as well as the other, and puts this into a wrapper that keeps its scheduler as
    `scheduler` by itself (Accelerate's `AcceleratedScheduler`, Lightning's `LRSchedulerConfig`), until `detach()`.

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
        """Nothing: the clock steps the scheduler."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["scheduler"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:  # copied as it is made: a copy that is still empty has nothing to ask
        return HeldScheduler, (self.__dict__["scheduler"],)

    def __repr__(self) -> str:
        return f"<HeldScheduler of {self.__dict__['scheduler']!r}>"


def held_by(scheduler: Any) -> tuple[Any, Any]:
    """The real scheduler, and the wrapper that keeps it as `scheduler`; `None` where there is none to be changed."""
    holder = None
    while isinstance(scheduler, HeldScheduler) or _wraps(scheduler):
        # What is held already was so before this controller, and stays so after it.
        holder = None if isinstance(scheduler, HeldScheduler) else scheduler
        scheduler = scheduler.scheduler
    return scheduler, holder


def _wraps(thing: Any) -> bool:
    """Whether it is Accelerate's wrapper, or Lightning's, which has no step; another one may do more than that."""
    return hasattr(thing, "scheduler") and (hasattr(thing, "step_with_optimizer") or not hasattr(thing, "step"))


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that is stepped, in the wrapper of Accelerate, Fabric or Lightning.

    Such a wrapper shares groups and state with what it keeps as `optimizer`. One with a state of its own, Lookahead
    say, is an optimizer of another kind.

    Raises:
        UnsupportedError: it is DeepSpeed's.
    """
    refuse_deepspeed(optimizer)
    inner = getattr(optimizer, "optimizer", None)
    refuse_deepspeed(inner)
    if not isinstance(inner, Optimizer) or inner is optimizer:
        return optimizer
    shared = inner.param_groups is optimizer.param_groups and inner.state is optimizer.state
    return bare_optimizer(inner) if shared else optimizer


def refuse_deepspeed(thing: object) -> None:
    """Raise for DeepSpeed's engine and optimizers.

    Raises:
        UnsupportedError: it is one of them.
    """
    if any(cls.__module__.split(".")[0] == "deepspeed" or "DeepSpeed" in cls.__name__ for cls in type(thing).__mro__):
        raise UnsupportedError(
            f"DeepSpeed is not supported ({type(thing).__name__}): its engine takes the gradients out of .grad during "
            "the backward and steps by itself, so that no hook sees a micro-batch's gradient, their mean or the step. "
            "Train under DDP, or under FSDP2 (fully_shard), which shards as much."
        )
