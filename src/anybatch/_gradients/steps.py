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
    """The calls of `optimizer.step()`, by torch's own hooks.

    Attributes:
        read: The last `found_inf` as it was read with the norms of its window; `None` where it was not.
    """

    def __init__(self) -> None:
        self._found: Tensor | None = None
        self.read: bool | None = None

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

    def found_inf(self, optimizer: Optimizer) -> Tensor | None:
        """The number on a device by which a fused optimizer under a GradScaler skips the coming step by itself."""
        self._found, self.read = getattr(optimizer, "found_inf", None), None
        return self._found

    def skipped(self, optimizer: Optimizer) -> bool:
        """Whether the step that has ended changed nothing. Reads the device unless `read` is of this step."""
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        if found is None or found is not self._found or self.read is None:
            return found is not None and bool(found)
        return self.read

    def withheld(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """A context in which a step changes nothing."""
        return withheld(optimizer)
