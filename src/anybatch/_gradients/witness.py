"""Witness: tells from one parameter's gradient whether a window goes on, was thrown away, or mixes two steps.

[Note: the window] A window is what happens between two optimizer steps: A backwards, one a micro-batch. Its state is
    open    at least one backward was seen since the last step;
    closed  the step was taken, `close()`: the next backward opens a new one;
    thrown  `zero_grad` came without a step: the next backward finds cleared gradients and opens a new one.

A gradient is remembered by its object and its versions, and looked at where these leave a doubt: DDP and FSDP2 put
other tensors in its place and write into them, and `grad.data.zero_()` changes no version. On a device a look waits for
it, so there is none while nothing looks changed.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from anybatch._errors import UsageError
from anybatch._gradients.norms import real_of, total_squared_norm

_NOT_CLEARED = (
    "The gradients of the last optimizer step were not cleared, so .grad mixes two steps: call optimizer.zero_grad() "
    "after optimizer.step()."
)
_FOREIGN = (
    "There are gradients in .grad that no backward of this step made, from {origin}, so .grad mixes two things: call "
    "optimizer.zero_grad() before the first backward of the step, or use torch.autograd.grad, which leaves .grad alone."
)


@dataclass(frozen=True)
class Seen:
    """A parameter's gradient as it was at some time.

    Args:
        parameter: whose.
        grad: the object, held weakly: a cleared gradient's memory is free.
        versions: its own and, of a DTensor, its shard's.
        nonzero: whether it was; `None` where nobody looked.
    """

    parameter: Tensor
    grad: TensorWeakRef
    versions: tuple[int, int]
    nonzero: bool | None

    def remains(self) -> bool:
        """Whether it is still there: the same object that nobody has written to, or another one; and not zero."""
        grad = self.parameter.grad
        if grad is None or self.nonzero is False:
            return False
        if self.grad() is grad and _versions(grad) != self.versions:
            return False
        return not is_zero(grad)

    def cleared(self) -> bool:
        """Whether it is gone, or zero where it was not."""
        grad = self.parameter.grad
        return grad is None or ((self.changed() or self.nonzero is True) and is_zero(grad))

    def changed(self) -> bool:
        """Whether it is another object, or was written to."""
        grad = self.parameter.grad
        return grad is None or self.grad() is not grad or _versions(grad) != self.versions


def see(parameter: Tensor) -> Seen | None:
    """The gradient of `parameter` as it is now; `None` where it has none."""
    grad = parameter.grad
    if grad is None:
        return None
    return Seen(parameter, TensorWeakRef(grad), _versions(grad), not is_zero(grad) if _on_host(grad) else None)


class Witness:
    """The first parameter that got a gradient in a window, and what its `.grad` was after each backward."""

    def __init__(self) -> None:
        self._stale: Seen | None = None  # what must be gone when the next backward begins
        self._text = ""  # what is wrong if it is not
        self.open()

    def open(self) -> None:
        """A new window: nobody has seen anything."""
        self._parameter: Tensor | None = None
        self._seen: Seen | None = None  # after the last backward; None while there was none
        self._mixed = False  # whether a backward of the window added to what was stale

    def stepped(self) -> None:
        """The step was taken: the gradients it used are stale from now on."""
        self._stale, self._text = None if self._parameter is None else see(self._parameter), _NOT_CLEARED

    def foreign(self, parameter: Tensor, *, origin: str) -> None:
        """The gradient that `parameter` has now is not one of this window alone."""
        self._stale, self._text = see(parameter), _FOREIGN.format(origin=origin)

    def renewed(self) -> None:
        """`.grad` was written anew: nothing in it is stale."""
        self._stale = None

    def cleared(self, pending: int) -> bool:
        """Whether the open window's gradients were cleared since the last backward."""
        if self._parameter is None:
            return False
        if pending == 0:  # a backward that raised
            return True
        return self._seen is not None and self._seen.cleared()

    def begin(self, parameter: Tensor) -> None:
        """A backward begins with `parameter`."""
        self._mixed = self._mixed or self._remains()
        if self._parameter is None:
            self._parameter = parameter

    def confirm(self, *, arrived: bool) -> None:
        """A backward has ended; `arrived` tells whether its gradients are in `.grad` already.

        Raises:
            UsageError: it added to gradients of something else.
        """
        self._check()
        self._stale = None
        self._seen = see(self._parameter) if arrived and self._parameter is not None else None

    def _check(self) -> None:
        """Look whether `.grad` is of this window alone.

        Raises:
            UsageError: it is not.
        """
        if self._mixed:
            raise UsageError(self._text)

    def end(self) -> None:
        """The step comes now: `.grad` must be of this window alone, also what was added since the last backward.

        Raises:
            UsageError: something was.
        """
        self._mixed = self._mixed or (self._seen is not None and self._remains())
        self._check()

    def emptied(self) -> bool:
        """Whether `.grad`, on a host, is zero and was not; on a device nobody looks."""
        return self._seen is not None and self._seen.nonzero is True and self._seen.cleared()

    def fingerprint(self) -> float | None:
        """A number of the open window's `.grad`, to tell whether it is what it was; waits for the device."""
        grad = None if self._parameter is None else self._parameter.grad
        return None if grad is None else total_squared_norm([local_of(grad)]).item()

    def _remains(self) -> bool:
        return self._stale is not None and self._stale.remains()


def local_of(grad: Tensor) -> Tensor:
    """The tensor itself, or a DTensor's shard on this rank."""
    local: Tensor = getattr(grad, "_local_tensor", grad)
    return local


def _on_host(grad: Tensor) -> bool:
    """Whether a look at it waits for nothing."""
    return local_of(grad).device.type == "cpu"


def _versions(grad: Tensor) -> tuple[int, int]:
    return grad._version, local_of(grad)._version


def is_zero(grad: Tensor) -> bool:
    """Whether every entry is; the first row says no in nearly every case."""
    values = real_of(local_of(grad))
    if values.numel() == 0:
        return True
    first = values[0] if values.dim() else values
    return not (bool(first.any()) or bool(values.any()))
