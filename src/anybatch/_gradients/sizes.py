"""Sizes: of the micro-batches of a window, as given, or as the forwards of the model show them; and their weights."""

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

_LOOKS = 3  # steps in which the sizes are compared; they cost a few microseconds a forward


class Sizes:
    """A hook before each forward of `model` that is part of training; a compiled forward shows nothing.

    Args:
        model: the outermost module, as the loop calls it.
        given: the size of a micro-batch as `attach` was told, or `"auto"` to take the first dimension of what a forward
            gets for it; `None` where sizes do not matter.
    """

    def __init__(self, model: nn.Module | None = None, *, given: float | Literal["auto"] | None = None) -> None:
        self.auto = given == "auto"
        self.now = 1.0 if given is None or given == "auto" else float(given)  # of a micro-batch
        self._given = None if given is None or self.auto else self.now  # what forwards are compared with
        self.weight: float | None = None  # of the next micro-batch in the step's mean
        self._rows: int | None = None  # of the first part of a batch, whose size is the given one
        self._part: float | None = None  # the size of the next micro-batch, a part of a batch
        self._compared = True  # whether the window's forwards are compared with the given size
        self._last = self.now
        self._left = _LOOKS
        self._shapes: list[torch.Size] = []
        self._model = model
        self._handle: RemovableHandle | None = None
        if model is not None and given is not None:
            self._handle = model.register_forward_pre_hook(_Hook(self), with_kwargs=True)
        self.open()

    def open(self) -> None:
        """A new window."""
        self.shares = Shares()

    def count(self, backwards: int) -> None:
        """The window has come to so many backwards: note the size and the weight of those since the last call.

        Raises:
            UsageError: no forward was seen, or several of other sizes.
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
        """Each micro-batch to come is of `value`, and no forward need tell."""
        self.now, self.auto, self._given = value, False, None
        self.detach()

    def _shown(self) -> float:
        sizes = {shape[0] for shape in self._shapes}
        self._shapes.clear()
        if len(sizes) != 1:
            seen = "no forward of the model" if not sizes else f"forwards of {sorted(sizes)} examples"
            raise UsageError(
                f'micro_batch="auto" saw {seen} before this backward, so it cannot tell the size: set '
                "controller.micro_batch before the backward. (A compiled forward is not seen.)"
            )
        return float(sizes.pop())

    def check(self, backwards: int) -> None:
        """Compare a step's forwards with what `attach` was told, in the first steps."""
        shapes, self._shapes = self._shapes, []
        compared, self._compared = self._compared, True
        if self._given is None or not shapes or backwards == 0 or not compared:
            return
        self._left -= 1
        if self._left == 0:
            self.detach()
        said = _mismatch(shapes, backwards, self._given)
        if said:
            self.detach()
            warnings.warn(said, AnybatchWarning, stacklevel=2)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A stretch whose forwards are not training."""
        before = list(self._shapes)
        try:
            yield
        finally:
            self._shapes = before

    def forget(self) -> None:
        """What was seen has nothing to do with the micro-batches of this step."""
        self._shapes.clear()

    def detach(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins."""
        if model is not self._model or not torch.is_grad_enabled():
            return
        shape = next((t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0), None)
        if shape is not None:
            self._shapes.append(shape)


class _Hook:
    """What the model holds; copied or pickled with it, it does nothing: the copy has no controller."""

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
    """In what the forwards of a step differ from what was said; empty where nothing is certain."""
    first = shapes[0]
    if any(shape != first for shape in shapes):
        return ""
    if backwards == 2 * len(shapes):
        return (
            f"There were {backwards} backwards after {len(shapes)} forwards. Each backward counts as a micro-batch: if "
            "these are several losses of one, put their backwards into `with controller.together():`."
        )
    tokens = {first[i] * first[i + 1] for i in range(len(first) - 1)}
    if len(shapes) != backwards or given in {*first, *tokens, first.numel()}:
        return ""
    return (
        f"micro_batch={given:g}, but each forward of the model got a tensor of shape {list(first)}. The scale of a "
        "step is counted from micro_batch, what one backward on one rank sees, in the unit of base_batch: give "
        f"{first[0]}, or micro_batch='auto', or set controller.micro_batch before each backward."
    )
