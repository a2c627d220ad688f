"""A controller's state inside of its optimizer's, so that whatever saves the one saves the other.

`optimizer.state_dict()` has it as numbers in the first parameter group, where every way of saving keeps them, flattened
distributed checkpoints too. Loading it into an optimizer with a controller takes them out again; loaded before, they
wait there for `attach`. In an optimizer that is trained they stay no longer than to the next step.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from anybatch._errors import AnybatchWarning, StateError
from anybatch._scaling import Clock

_PREFIX = "anybatch_run_"
_DROP = "To begin anew, remove what begins with 'anybatch_run_' from state['param_groups'][0] before loading it."


class StateInOptimizer:
    """Hooks on `optimizer` that write and read the state.

    Args:
        optimizer: what carries it.
        clock: the run's.
        written: gives the state.
        read: takes it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        clock: Clock,
        written: Callable[[], Mapping[str, float]],
        read: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._optimizer = optimizer
        self._clock = clock
        self._written = written
        self._read = read
        self._put_in = False
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(lambda *_: self._clear())),
            optimizer.register_state_dict_pre_hook(lambda _: self._put()),
            optimizer.register_load_state_dict_post_hook(lambda _: self.take()),
        ]

    def remove(self) -> None:
        """The optimizer carries nothing any more."""
        for handle in self._handles:
            handle.remove()
        _popped(self._optimizer)

    def take(self) -> None:
        """Go on from what the optimizer's state came with, if it did.

        Raises:
            StateError: it is of another model or base batch, or damaged.
        """
        numbers = _popped(self._optimizer)
        if not numbers:
            return
        before = numbers.pop("total", 0.0)
        try:
            self._read(numbers)
        except StateError as error:
            raise StateError(f"{error} It came with the optimizer's state. {_DROP}") from None
        total = self._clock.total
        if total is None or (before == total and not self._clock.done):
            return
        whose = f"a run of {before:g} base iterations" if before else "a run without a total"
        here = "is over there" if self._clock.done else "goes on there"
        warnings.warn(
            f"The optimizer's state is of {whose}, and has come to tau = {self._clock.tau:g}: this run, of {total:g}, "
            f"{here}. {_DROP}",
            AnybatchWarning,
            stacklevel=2,
        )

    def _put(self) -> None:
        # Into the live group: a flattened distributed checkpoint loads only what the optimizer's groups have.
        numbers = {**self._written(), "total": self._clock.total or 0.0}
        group = self._optimizer.param_groups[0]
        group.update({_PREFIX + name: float(value) for name, value in numbers.items()})
        self._put_in = True

    def _clear(self) -> None:
        """After the step they would be of the past, and a copy of the optimizer would have them."""
        if self._put_in:
            self._put_in = False
            _popped(self._optimizer)


def _popped(optimizer: Optimizer) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    names = [name for name in group if isinstance(name, str) and name.startswith(_PREFIX)]
    return {name.removeprefix(_PREFIX): group.pop(name) for name in names}
