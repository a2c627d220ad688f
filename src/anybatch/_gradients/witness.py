"""Witness: tells from one parameter's gradient whether a window goes on, was thrown away, or mixes two steps.

[Note: the window] A window is what happens between two optimizer steps: A backwards, one a micro-batch. Its state is
    open    at least one backward was seen since the last step;
    closed  the step was taken, `close()`: the next backward opens a new one;
    thrown  `zero_grad` came without a step: the next backward finds cleared gradients and opens a new one.
"""

from torch import Tensor

from anybatch._errors import UsageError
from anybatch._gradients.norms import total_squared_norm


class Witness:
    """The first parameter that got a gradient in a window, and the version of its `.grad` after each backward."""

    def __init__(self) -> None:
        self._stale: tuple[Tensor, int] | None = None
        self.open()

    def open(self) -> None:
        """A new window: nobody has seen anything."""
        self._parameter: Tensor | None = None
        self._version: int | None = None  # of its gradient after the last backward; None while there was none
        self._mixed = False  # whether the window's first backward added to gradients of the step before

    def stepped(self) -> None:
        """The step was taken: the gradients it used are stale from now on."""
        self._stale = None
        if self._parameter is not None and self._parameter.grad is not None:
            self._stale = (self._parameter, local_of(self._parameter.grad)._version)

    def cleared(self, pending: int) -> bool:
        """Whether the open window's gradients were cleared: gone, or changed since the last backward and now zero."""
        if self._parameter is None:
            return False
        if pending == 0:  # a backward that raised
            return True
        if self._version is None:  # FSDP2 without synchronisation: the gradient is not in `.grad` yet
            return False
        grad = self._parameter.grad
        if grad is None:
            return True
        return local_of(grad)._version != self._version and total_squared_norm([local_of(grad)]).item() == 0

    def see(self, parameter: Tensor, *, pending: int) -> None:
        """A backward begins with `parameter`."""
        if pending == 0 and self._stale is not None:
            stale, version = self._stale
            self._mixed = stale.grad is not None and local_of(stale.grad)._version == version
        if self._parameter is None:
            self._parameter = parameter

    def forget(self) -> None:
        """The backward accumulated nothing."""
        self._parameter = None

    def renewed(self) -> None:
        """`.grad` was written anew: nothing in it is stale."""
        self._stale = None

    def confirm(self) -> None:
        """A backward has ended.

        Raises:
            UsageError: it added to the gradients of the step before.
        """
        self._stale = None
        if self._mixed:
            raise UsageError(
                "The gradients of the last optimizer step were not cleared, so .grad mixes two steps: call "
                "optimizer.zero_grad() after optimizer.step()."
            )
        if self._parameter is not None and self._parameter.grad is not None:
            self._version = local_of(self._parameter.grad)._version


def local_of(grad: Tensor) -> Tensor:
    """The tensor itself, or a DTensor's shard on this rank."""
    local: Tensor = getattr(grad, "_local_tensor", grad)
    return local
