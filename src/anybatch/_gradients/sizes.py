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
from anybatch._gradients.forward_hook import hook_forward
from anybatch._gradients.window import Shares

_COMPARED = 3  # number of steps in which the shapes of all forwards are compared; later, only the batch dimension is


class Sizes:
    """The sizes of micro-batches, with a hook before each forward of `model`; a compiled forward has no hook.

    Args:
        model: The outermost module, as the loop calls it.
        given: `micro_batch` of `attach`: a number, or `"auto"` for dimension `batch_dim` of the forward's tensors.
            `None` where sizes have no effect.
    """

    def __init__(self, model: nn.Module | None = None, *, given: float | Literal["auto"] | None = None) -> None:
        self.auto = given == "auto"
        self.now = 1.0 if given is None or given == "auto" else float(given)  # of a micro-batch
        self._given = None if given is None or self.auto else self.now  # the size to compare with forwards
        self.weight: float | None = None  # of the next micro-batch in the step's mean
        self._rows: int | None = None  # of the part of a batch that has the given size: the first part
        self._doubted = False  # whether the first part has another number of rows; then the first that has the size
        self._part: float | None = None  # the size of the next micro-batch, a part of a batch
        self._compared = True  # whether the window's forwards are compared with the given size
        self._last: float | None = None  # of the micro-batches counted so far, the last
        self._left, self._confirmed = _COMPARED, True
        # After the first steps: the rows of each forward until then, if they are the given size; and the number of
        # forwards with as many rows in the window.
        self.usual, self.forwards = 0, 0
        self.batch_dim = 0
        self._shapes: list[torch.Size] = []  # of the first tensor of each forward
        self._rows_of: list[set[int]] = []  # with "auto": the sizes of all tensors of each forward
        self._model = model
        self._handle: RemovableHandle | None = None
        if model is not None and given is not None:
            self._handle = hook_forward(model, _Hook(self))
        self.open()

    def open(self) -> None:
        """Begin a window."""
        self.shares = Shares()
        self._counted = 0  # backwards whose sizes are in `shares`

    def count(self, backwards: int, *, together: bool = False) -> None:
        """Add the sizes and weights of the backwards since the last call; the window now has `backwards`.

        With `together` all forwards since then belong to one micro-batch, whose size is that of the first.

        Raises:
            UsageError: with `"auto"`, there was no forward, or forwards of different sizes; a weight on no example.
        """
        before = self.shares
        new = backwards - self._counted
        if new == 0:
            return
        self._counted = backwards
        if self.auto:
            self.now = self._shown(together=together)
        size, self._part = self.now if self._part is None else self._part, None
        weight, self.weight = self.weight, None
        if size == 0:  # an empty micro-batch is no sample of the noise
            if weight:
                raise UsageError(f"An empty micro-batch has no part in the step's mean, but its weight is {weight:g}.")
            if weight is None:
                return
        self._last = size or self._last
        self.shares = Shares(
            before.count + new,
            before.inverse_sizes + (new / size if size else 0.0),
            before.sizes + new * size,
            before.weights + new * (1.0 if weight is None else weight),
            before.squares + new * (1.0 if weight is None else weight**2),
            before.weighted + (0 if weight is None else new),
        )

    @property
    def inverse_of_last(self) -> float:
        """One over the size of the last micro-batch that was counted."""
        return 1 / (self._last or self.now or 1.0)

    def part(self, rows: int) -> None:
        """The next micro-batch is a part of so many rows; its size is in proportion to that of the first part."""
        if self._given is not None:
            if self._rows is None or (self._doubted and rows == self._given):
                self._rows = rows
            self._part = self._given * rows / self._rows
            self._compared = self._compared and rows == self._rows

    def set(self, value: float) -> None:
        """Give each later micro-batch the size `value`, and read no forward any more."""
        self.now, self.auto, self._given, self._part = value, False, None, None
        self.detach()

    @property
    def text(self) -> str:
        """The size of a micro-batch and its source, as text; empty while unknown."""
        if not self.auto or self._last is None:
            return ""
        return f"micro-batch {self.now:g} (dimension {self.batch_dim} of the forward's input)"

    def _shown(self, *, together: bool) -> float:
        found, self._rows_of = self._rows_of[:1] if together else self._rows_of, []
        sizes = set().union(*found)
        if len(sizes) == 1:
            return float(sizes.pop())
        dim = f"dimension {self.batch_dim}"
        if any(len(each) > 1 for each in found):
            several = next(each for each in found if len(each) > 1)
            seen = f"a forward whose tensors have the sizes {sorted(several)} in {dim}"
        else:
            seen = f"forwards of {sorted(sizes)} examples ({dim})" if sizes else "no forward of the model"
        raise UsageError(
            f'micro_batch="auto" saw {seen} before this backward, so the size is unknown. Set controller.batch_dim to '
            "the dimension that counts examples, or controller.micro_batch before each backward. (A compiled forward "
            "is not seen.)"
        )

    def check(self, backwards: int) -> None:
        """Compare the forwards of a step with the size passed to `attach`."""
        shapes, self._shapes = self._shapes, []
        compared, self._compared = self._compared, True
        forwards, self.forwards = self.forwards + len(shapes), 0
        if self._given is None or not shapes or backwards == 0 or not compared:
            return
        rows = {shape[self.batch_dim] for shape in shapes}
        others = sorted(rows - {self._given})
        if forwards == backwards and others and (self.usual or self._given in rows):
            self._warn(
                f"micro_batch={self._given:g}, but a forward of this step got {others[0]} rows and counts as "
                f"{self._given:g}. A loader gives a smaller last batch unless drop_last=True. Pass attach "
                "micro_batch='auto', loop over controller.parts(batch, n), or set controller.micro_batch before each "
                "backward."
            )
        elif self._left > 0:
            self._left -= 1
            self._confirmed = self._confirmed and rows == {self._given} and forwards == backwards
            if self._left == 0 and not self._confirmed:
                self.detach()
            elif self._left == 0:
                self.usual = int(self._given)
            if mismatch := _mismatch(shapes, backwards, self._given, self.batch_dim):
                self._doubted = True
                self._warn(mismatch)

    def _warn(self, text: str) -> None:
        self.detach()
        warnings.warn(text, AnybatchWarning, stacklevel=3)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose forwards are not training."""
        before = list(self._shapes), list(self._rows_of), self.forwards
        try:
            yield
        finally:
            self._shapes, self._rows_of, self.forwards = before

    def forget(self) -> None:
        """Drop the forwards, which are not those of the next micro-batch."""
        self._shapes.clear()
        self._rows_of.clear()
        self.forwards = 0

    def detach(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the shapes of a forward's tensors."""
        dim = self.batch_dim
        if model is not self._model or not torch.is_grad_enabled():
            return
        shapes = [t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > dim]
        if not shapes:
            return
        if self.auto:
            self._rows_of.append({shape[dim] for shape in shapes})
        else:
            self._shapes.append(shapes[0])


class _Hook:
    """The hook on the model. A copied or pickled one does nothing: the copy of the model has no controller."""

    def __init__(self, sizes: Sizes | None) -> None:
        self._sizes = sizes if sizes is None else weakref.ref(sizes)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes = None if self._sizes is None else self._sizes()
        if sizes is None or torch.compiler.is_compiling():
            return
        usual, dim = sizes.usual, sizes.batch_dim
        if usual and args and isinstance(args[0], Tensor) and args[0].dim() > dim and args[0].shape[dim] == usual:
            sizes.forwards += torch.is_grad_enabled()  # almost every forward
        else:
            sizes.see(model, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)


def _mismatch(shapes: list[torch.Size], backwards: int, given: float, dim: int) -> str:
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
        f"{first[dim]}, or micro_batch='auto', or set controller.micro_batch before each backward."
    )
