"""The steps of an optimizer: which parameters they train, where they begin and end, and whether one was skipped."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._gradients.parameters import withheld

Hook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Any]  # as torch calls it before or after a step


class Handle(Protocol):
    """What removes a hook."""

    def remove(self) -> None:
        """Remove it."""


class Steps:
    """The calls of `optimizer.step()`, by torch's own hooks."""

    def members(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """All parameters of the optimizers, as their groups are now."""
        return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

    def hook(self, optimizer: Optimizer, before: Hook, after: Hook) -> list[Handle]:
        """Call `before` and `after` around each step."""
        # A compiled step must not trace these: it would make the first gain a constant, or apply none.
        return [
            optimizer.register_step_pre_hook(torch.compiler.disable(before)),
            optimizer.register_step_post_hook(torch.compiler.disable(after)),
        ]

    def skipped(self, optimizer: Optimizer) -> bool:
        """Whether the step that has ended changed nothing: a fused optimizer under a GradScaler skips by itself."""
        found_inf = getattr(optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def withheld(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """A context in which a step changes nothing."""
        return withheld(optimizer)
