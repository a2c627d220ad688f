"""Recognises one parameter's gradient: whether a window goes on, was discarded, or mixes two steps.

[Note: the window] A window is what happens between two optimizer steps: A backwards, one for each micro-batch. It is
    open       at least one backward was seen since the last step;
    closed     the step was taken, `stepped()`: the next backward opens a new window;
    discarded  `zero_grad` was called without a step: the next backward finds cleared gradients and opens a new window.

A gradient is recognised by its identity and its version counters. Where these are inconclusive its values are read: DDP
and FSDP2 put other tensors in its place and write into them, and `grad.data.zero_()` changes no version. On a device a
read would synchronise, so there is none while identity and versions are unchanged.
"""

from dataclasses import dataclass
from weakref import ref

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from anybatch._errors import UsageError
from anybatch._gradients.norms import local_of, real_of, total_squared_norm

_NOT_CLEARED = (
    "The gradients of the last optimizer step were not cleared, so .grad mixes two steps: call optimizer.zero_grad() "
    "after optimizer.step()."
)
_FOREIGN = (
    "There are gradients in .grad that no backward of this step made, from {origin}, so .grad mixes two things: call "
    "optimizer.zero_grad() before the first backward of the step, or use torch.autograd.grad, which leaves .grad alone."
)


@dataclass(frozen=True)
class Fingerprint:
    """A parameter's gradient as it was at some time.

    Args:
        parameter: whose gradient it is, held weakly.
        grad: the object, held weakly: the memory of a cleared gradient is free.
        versions: its own version counter and, of a DTensor, its shard's.
        nonzero: whether it was not zero; `None` where its values were not read.
    """

    parameter: "ref[Tensor]"
    grad: TensorWeakRef
    versions: tuple[int, int]
    nonzero: bool | None

    def remains(self) -> bool:
        """Whether the gradient is still there: the same object, unchanged, or another one; and not zero."""
        grad = _grad_of(self.parameter)
        if grad is None or self.nonzero is False:
            return False
        if self.grad() is grad and _versions(grad) != self.versions:
            return False
        return not is_zero(grad)

    def cleared(self) -> bool:
        """Whether it is gone, or zero where it was not."""
        grad = _grad_of(self.parameter)
        return grad is None or ((self.changed(grad) or self.nonzero is True) and is_zero(grad))

    def changed(self, grad: Tensor) -> bool:
        """Whether `grad` is another object, or was written to."""
        return self.grad() is not grad or _versions(grad) != self.versions


def fingerprint_of(parameter: Tensor) -> Fingerprint | None:
    """The gradient of `parameter` as it is now; `None` where it has none."""
    grad = parameter.grad
    if grad is None:
        return None
    return Fingerprint(
        ref(parameter), TensorWeakRef(grad), _versions(grad), not is_zero(grad) if _on_host(grad) else None
    )


class GradientFingerprint:
    """The first parameter that got a gradient in a window, and what its `.grad` was after each backward."""

    def __init__(self) -> None:
        self._stale: Fingerprint | None = None  # what must be gone when the next backward begins
        self._error = ""  # the message if it is not
        self.open()

    def open(self) -> None:
        """Begin a window."""
        self._parameter: ref[Tensor] | None = None
        self._last: Fingerprint | None = None  # after the last backward; None while there was none
        self._mixed = False  # whether a backward of the window added to what was stale

    def drop(self) -> None:
        """The parameter has left the optimizer."""
        self._stale = None
        self.open()

    def stepped(self) -> None:
        """The step was taken: the gradients it used are stale from now on."""
        self._stale = self._now()
        self._error = _NOT_CLEARED

    def foreign(self, parameter: Tensor, *, origin: str) -> None:
        """The gradient that `parameter` has now is not of this window alone."""
        self._stale, self._error = fingerprint_of(parameter), _FOREIGN.format(origin=origin)

    def renewed(self) -> None:
        """`.grad` was written anew: nothing in it is stale."""
        self._stale = None

    def cleared(self, pending: int) -> bool:
        """Whether the open window's gradients were cleared since the last backward."""
        if self._parameter is None:
            return False
        if pending == 0:  # a backward that raised
            return True
        return self._last is not None and self._last.cleared()

    def begin(self, parameter: Tensor) -> None:
        """A backward begins with `parameter`; a nested one belongs to the backward around it."""
        self._mixed = self._mixed or self._remains()
        if self._parameter is None:
            self._parameter = ref(parameter)

    def confirm(self, *, arrived: bool) -> None:
        """A backward has ended; `arrived` tells whether its gradients are in `.grad` already.

        Raises:
            UsageError: it added to gradients of something else.
        """
        self._check()
        self._stale = None
        self._last = self._now() if arrived else None

    def end(self) -> None:
        """Check before the step that `.grad` is of this window alone, with all that was added since the last backward.

        Raises:
            UsageError: it is not.
        """
        self._mixed = self._mixed or (self._last is not None and self._remains())
        self._check()

    def emptied(self) -> bool:
        """Whether `.grad`, on a host, is zero and was not; on a device its values are not read."""
        return self._last is not None and self._last.nonzero is True and self._last.cleared()

    def changed(self) -> bool:
        """Whether `.grad` was written to, or replaced, since the last backward."""
        grad = _grad_of(self._parameter)
        return self._last is not None and grad is not None and self._last.changed(grad)

    def value(self) -> float | None:
        """The squared norm of the parameter's `.grad`, to compare it with a later one; synchronises."""
        grad = _grad_of(self._parameter)
        return None if grad is None else total_squared_norm([local_of(grad)]).item()

    def _now(self) -> Fingerprint | None:
        parameter = None if self._parameter is None else self._parameter()
        return None if parameter is None else fingerprint_of(parameter)

    def _check(self) -> None:
        if self._mixed:
            raise UsageError(self._error)

    def _remains(self) -> bool:
        return self._stale is not None and self._stale.remains()


def _grad_of(parameter: "ref[Tensor] | None") -> Tensor | None:
    """The gradient of a parameter that is still alive."""
    alive = None if parameter is None else parameter()
    return None if alive is None else alive.grad


def _on_host(grad: Tensor) -> bool:
    """Whether reading its values does not synchronise with a device."""
    return local_of(grad).device.type == "cpu"


def _versions(grad: Tensor) -> tuple[int, int]:
    return grad._version, local_of(grad)._version


def is_zero(grad: Tensor) -> bool:
    """Whether every entry is zero; the first row decides in nearly every case."""
    values = real_of(local_of(grad))
    if values.numel() == 0:
        return True
    first = values[0] if values.dim() else values
    return not (bool(first.any()) or bool(values.any()))
