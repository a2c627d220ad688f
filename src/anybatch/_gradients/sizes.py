"""Sizes: the sizes and weights of the micro-batches of a window, from the user or the model's forwards."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from anybatch._errors import AnybatchWarning, UsageError
from anybatch._gradients.window import Shares

_COMPARED = 3  # number of steps whose sizes are compared; each forward costs a few microseconds


class Sizes:
    """The sizes of micro-batches, with a hook before each forward of `model`; a compiled forward has no hook.

    Args:
        model: The outermost module, as the loop calls it.
        given: `micro_batch` of `attach`: a number, or `"auto"` for the first dimension of the forward's first tensor.
            `None` where sizes have no effect.
    """

    def __init__(self, model: nn.Module | None = None, *, given: float | Literal["auto"] | None = None) -> None:
        self.auto = given == "auto"
        self.now = 1.0 if given is None or given == "auto" else float(given)  # of a micro-batch
        self._given = None if given is None or self.auto else self.now  # the size to compare with forwards
        self.weight: float | None = None  # of the next micro-batch in the step's mean
        self._rows: int | None = None  # of the first part of a batch, whose size is the given one
        self._part: float | None = None  # the size of the next micro-batch, a part of a batch
        self._compared = True  # whether the window's forwards are compared with the given size
        self._last = self.now
        self._left = _COMPARED
        self._shapes: list[torch.Size] = []
        self._model = model
        self._handle: RemovableHandle | None = None
        if model is not None and given is not None:
            self._handle = model.register_forward_pre_hook(_Hook(self), with_kwargs=True)
        self.open()

    def open(self) -> None:
        """Begin a window."""
        self.shares = Shares()

    def count(self, backwards: int) -> None:
        """Add the sizes and weights of the backwards since the last call; the window now has `backwards`.

        Raises:
            UsageError: with `"auto"`, there was no forward, or forwards of different sizes.
        """
        before = self.shares
        new = backwards - before.count
        if new == 0:
            return
        if self.auto:
            self.now = self._shown()
        size, self._part = self._part or self.now, None
        self._last = size
        weight, self.weight = self.weight, None
        self.shares = Shares(
            backwards,
            before.inverse_sizes + new / size,
            before.sizes + new * size,
            before.weights + new * (weight or 0.0),
            before.squares + new * (weight or 0.0) ** 2,
            before.weighted + (0 if weight is None else new),
        )

    @property
    def inverse_of_last(self) -> float:
        """One over the size of the last micro-batch that was counted."""
        return 1 / self._last

    def part(self, rows: int) -> None:
        """The next micro-batch is a part of so many rows; its size is in proportion to that of the first part."""
        if self._given is not None:
            self._rows = self._rows or rows
            self._part = self._given * rows / self._rows
            self._compared = self._compared and rows == self._rows

    def set(self, value: float) -> None:
        """Give each later micro-batch the size `value`, and read no forward any more."""
        self.now, self.auto, self._given = value, False, None
        self.detach()

    def _shown(self) -> float:
        sizes = {shape[0] for shape in self._shapes}
        self._shapes.clear()
        if len(sizes) != 1:
            seen = "no forward of the model" if not sizes else f"forwards of {sorted(sizes)} examples"
            raise UsageError(
                f'micro_batch="auto" saw {seen} before this backward, so the size is unknown: set '
                "controller.micro_batch before the backward. (A compiled forward is not seen.)"
            )
        return float(sizes.pop())

    def check(self, backwards: int) -> None:
        """Compare the forwards of a step with the size passed to `attach`, in the first steps."""
        shapes, self._shapes = self._shapes, []
        compared, self._compared = self._compared, True
        if self._given is None or not shapes or backwards == 0 or not compared:
            return
        self._left -= 1
        if self._left == 0:
            self.detach()
        mismatch = _mismatch(shapes, backwards, self._given)
        if mismatch:
            self.detach()
            warnings.warn(mismatch, AnybatchWarning, stacklevel=2)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose forwards are not training."""
        before = list(self._shapes)
        try:
            yield
        finally:
            self._shapes = before

    def forget(self) -> None:
        """Drop the forwards, which are not those of this step's micro-batches."""
        self._shapes.clear()

    def detach(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the shape of a forward's first tensor."""
        if model is not self._model or not torch.is_grad_enabled():
            return
        shape = next((t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0), None)
        if shape is not None:
            self._shapes.append(shape)


class _Hook:
    """The hook on the model. A copied or pickled one does nothing: the copy of the model has no controller."""

    def __init__(self, sizes: Sizes | None) -> None:
        self._sizes = sizes if sizes is None else weakref.ref(sizes)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._sizes is None or torch.compiler.is_compiling():
            return
        sizes = self._sizes()
        if sizes is not None:
            sizes.see(model, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)


def _mismatch(shapes: list[torch.Size], backwards: int, given: float) -> str:
    """A warning if the forwards of a step contradict the given size; empty where they may agree."""
    first = shapes[0]
    if any(shape != first for shape in shapes):
        return ""
    if backwards == 2 * len(shapes):
        return (
            f"There were {backwards} backwards after {len(shapes)} forwards. Each backward counts as a micro-batch: if "
            "several losses belong to one, put their backwards into `with controller.together():`."
        )
    tokens = {first[i] * first[i + 1] for i in range(len(first) - 1)}
    if len(shapes) != backwards or given in {*first, *tokens, first.numel()}:
        return ""
    return (
        f"micro_batch={given:g}, but each forward of the model got a tensor of shape {list(first)}. The scale of a "
        "step follows from micro_batch, the size of one backward on one rank in the unit of base_batch: pass "
        f"{first[0]}, or micro_batch='auto', or set controller.micro_batch before each backward."
    )
