"""A controller's state inside of its optimizer's, so that both are saved together.

`optimizer.state_dict()` has it as numbers in the first parameter group, which every way of saving keeps, flattened
distributed checkpoints too. An optimizer with a controller removes them when it loads them. If they were loaded before
`attach`, then `attach` removes them. A training optimizer has them until its next step at most.
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
    """Hooks on `optimizer` that write the result of `written` and pass it to `read` when it is loaded."""

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
        """Remove the hooks and the numbers."""
        for handle in self._handles:
            handle.remove()
        _popped(self._optimizer)

    def take(self) -> None:
        """Continue from the numbers in the optimizer's state, if there are any.

        Raises:
            StateError: they are of another model or base batch, or damaged.
        """
        numbers = _popped(self._optimizer)
        if not numbers:
            return
        before = numbers.pop("total", 0.0)
        try:
            self._read(numbers)
        except StateError as error:
            raise StateError(f"{error} It was in the optimizer's state. {_DROP}") from None
        total = self._clock.total
        if total is None or (before == total and not self._clock.done):
            return
        whose = f"a run of {before:g} base iterations" if before else "a run without a total"
        here = "is done there" if self._clock.done else "continues there"
        warnings.warn(
            f"The optimizer's state is of {whose}, at tau = {self._clock.tau:g}: this run, of {total:g}, "
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
        """Remove the numbers before a step, which makes them out of date; a copy of the optimizer would have them."""
        if self._put_in:
            self._put_in = False
            _popped(self._optimizer)


def _popped(optimizer: Optimizer) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    names = [name for name in group if isinstance(name, str) and name.startswith(_PREFIX)]
    return {name.removeprefix(_PREFIX): group.pop(name) for name in names}
