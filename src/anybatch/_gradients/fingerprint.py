"""Recognition of one parameter's gradient: whether a window continues, was discarded, or mixes two steps.

[Note: the window] A window has the A backwards between two optimizer steps, one for each micro-batch. Its states:
    open       There was at least one backward since the last step.
    closed     The step was taken, `stepped()`. The next backward opens a new window.
    discarded  `zero_grad` was called without a step. The next backward finds no gradients and opens a new window.

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
    "after optimizer.step(). If this backward is the loss of another network, as a generator's through its "
    "discriminator, run it inside of `with controller.paused():`, and clear these gradients before the next step's "
    "first backward."
)
_FOREIGN = (
    ".grad holds gradients that no backward of this step made, from {origin}, so it mixes two steps: call "
    "optimizer.zero_grad() before the first backward of the step, or use torch.autograd.grad, which leaves .grad alone."
)


@dataclass(frozen=True)
class Fingerprint:
    """The gradient of a parameter at one time. References are weak: the memory of a cleared gradient is free."""

    parameter: "ref[Tensor]"
    grad: TensorWeakRef
    versions: tuple[int, int]  # its own version counter and, of a DTensor, its shard's
    nonzero: bool | None  # `None` where its values were not read

    def remains(self) -> bool:
        """Whether there is still a gradient, not zero: the same object unchanged, or another object."""
        grad = _grad_of(self.parameter)
        if grad is None or self.nonzero is False or (self.grad() is grad and _versions(grad) != self.versions):
            return False
        return not is_zero(grad)

    def cleared(self) -> bool:
        """Whether there is no gradient any more, or it has become zero."""
        grad = _grad_of(self.parameter)
        return grad is None or ((self.changed(grad) or self.nonzero is True) and is_zero(grad))

    def changed(self, grad: Tensor) -> bool:
        """Whether `grad` is another object, or was written to."""
        return self.grad() is not grad or _versions(grad) != self.versions


def fingerprint_of(parameter: Tensor) -> Fingerprint | None:
    """The present gradient of `parameter`; `None` where it has none."""
    grad = parameter.grad
    if grad is None:
        return None
    nonzero = not is_zero(grad) if _on_host(grad) else None
    return Fingerprint(ref(parameter), TensorWeakRef(grad), _versions(grad), nonzero)


class GradientFingerprint:
    """The first parameter with a gradient in a window, and its `.grad` after each backward."""

    def __init__(self) -> None:
        self._stale: Fingerprint | None = None  # the gradient that the next backward must not find
        self._error = ""  # the message if it does
        self.open()

    def open(self) -> None:
        """Begin a window."""
        self._parameter: ref[Tensor] | None = None
        self._last: Fingerprint | None = None  # after the last backward
        self._mixed = False  # whether a backward of the window added to a stale gradient

    def drop(self) -> None:
        """Drop the parameter, which may have left the optimizer."""
        self._stale = None
        self.open()

    def stepped(self) -> None:
        """Mark the gradients as stale: the step was taken."""
        self._stale = self._now()
        self._error = _NOT_CLEARED

    def foreign(self, parameter: Tensor, *, origin: str) -> None:
        """Mark the gradient of `parameter` as stale: `origin` names a source outside of this window."""
        self._stale, self._error = fingerprint_of(parameter), _FOREIGN.format(origin=origin)

    def renewed(self) -> None:
        """Note that `.grad` was written anew, so that nothing in it is stale."""
        self._stale = None

    def cleared(self, pending: int) -> bool:
        """Whether the open window's gradients were cleared since the last backward."""
        if self._parameter is None:
            return False
        if pending == 0:  # a backward that raised
            return True
        return self._last is not None and self._last.cleared()

    def begin(self, parameter: Tensor) -> None:
        """Note the begin of a backward with `parameter`; a nested one belongs to the backward around it."""
        self._mixed = self._mixed or self._remains()
        if self._parameter is None:
            self._parameter = ref(parameter)

    def confirm(self, *, arrived: bool) -> None:
        """Note the end of a backward, whose gradients have `arrived` in `.grad`; raise if it added to a stale one."""
        self._check()
        self._stale = None
        self._last = self._now() if arrived else None

    def end(self) -> None:
        """Raise before the step if `.grad` is not of this window alone, additions after the last backward included."""
        self._mixed = self._mixed or (self._last is not None and self._remains())
        self._check()

    def emptied(self) -> bool:
        """Whether `.grad`, on a host, has become zero; on a device its values are not read."""
        return self._last is not None and self._last.nonzero is True and self._last.cleared()

    def changed(self) -> bool:
        """Whether `.grad` was written to, or replaced, since the last backward."""
        grad = _grad_of(self._parameter)
        return self._last is not None and grad is not None and self._last.changed(grad)

    def value(self) -> float | None:
        """The squared norm of the parameter's `.grad`, to compare with a later one; synchronises."""
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
    """The gradient of a parameter, if it still exists."""
    alive = None if parameter is None else parameter()
    return None if alive is None else alive.grad


def _on_host(grad: Tensor) -> bool:
    """Whether a read of its values does not synchronise with a device."""
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
