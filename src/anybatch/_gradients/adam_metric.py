"""Norms in Adam's own metric, in which each coordinate has the weight that Adam gives it.

    ||g||^2_P = sum_i g_i^2 / (sqrt(v_i / c) + eps)        c = 1 - beta2 ** step

v is the second moment before the step, which all micro-batches of one window share; c is its debiasing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._gradients.norms import local_of, norm_into, real_of, total_squared_norm
from anybatch._gradients.probe import Placement, Probe, Table
from anybatch._gradients.window import Norms

# Squares in every v before it counts: the relative error of an average of k squares is sqrt(2 / k), here 0.45; with one
# or two, 1 / sqrt(v) has not even a finite variance.
SQUARES = 10


@dataclass(frozen=True)
class Root:
    """What one parameter's gradient is divided by: `||g||^2_P = unit * ||g / divisor||^2`.

    Args:
        divisor: sqrt(sqrt(v) + eps * sqrt(c)), a new tensor.
        unit: sqrt(c), a number, or a tensor of shape `[]` where the step count is on the device.
    """

    divisor: Tensor
    unit: float | Tensor


class AdamNorms(Probe):
    """The norms of a window in the metric of an optimizer of the Adam family.

    Under FSDP2 each rank weighs its own shard of its own micro-batches. Micro-batches are exchangeable, so the same
    shard of the other ranks' gradients has the same expected norm.

    Args:
        optimizer: whose state is read.
        entry: the name of v in it; AMSGrad's maximum of it is found by itself.
        steps: gives the number of steps taken.
        rows: for a parameter, the rows of its gradient on a leaf for which this rank holds v; `None` for all.
        shards: number of ranks over which v is sharded.
    """

    name = "adam"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        entry: str,
        steps: Callable[[], int],
        rows: Callable[[Tensor], slice | None] = lambda _: None,
        shards: int = 1,
    ) -> None:
        self._optimizer = optimizer
        self._entry = entry
        self._steps = steps
        self._rows_of = rows
        self._shards = shards
        self._since = 0  # steps after which the youngest v has begun
        self.drop()

    def drop(self) -> None:
        """Drop all parameters."""
        self._rows: list[slice | None] = []
        self._table = Table()
        self._groups: dict[int, dict[str, Any]] = {}  # by the identity of a parameter
        self._known = False  # whether the weights of the window are known

    def follow(self, parameters: Sequence[Tensor], places: Sequence[Placement]) -> None:
        """Weigh these parameters as well, once they have been trained for a while."""
        self._rows.extend(map(self._rows_of, parameters))
        self._table.follow(places)
        self._since = self._steps()
        self._known = False

    def open(self, *, sampled: bool) -> bool:
        """Begin a window. The age of v is the number of steps: a parameter's own count may lie on a device, and reading
        it would synchronise.
        """
        self._table.clear()
        self._groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        self._known = sampled and self._steps() - self._since >= SQUARES
        return sampled

    def sample(self, row: int, index: int, parameter: Tensor, grad: Tensor) -> None:
        """Weigh the gradient that `parameter` got from micro-batch `row`."""
        if not self._known:
            return
        rows = self._rows[index]
        self._weigh(self._table.cell(row, index), parameter, grad if rows is None else grad[rows])

    def samples(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Weigh all gradients of a window at once."""
        squares = []
        for parameter, samples in zip(parameters, gradients, strict=True):
            root = self._root(parameter, samples) if self._known else None
            if root is None:
                return
            squares.append(total_squared_norm([real_of(samples) / root.divisor]) * root.unit)
        self._table.observe(squares, gradients[0].shape[0])

    def mean(self, parameters: Sequence[Tensor]) -> None:
        """Weigh this rank's part of `.grad`."""
        if not self._known:
            return
        for out, parameter in zip(self._table.mean_cells(parameters), parameters, strict=True):
            if parameter.grad is None:
                out.zero_()
            else:
                self._weigh(out, parameter, local_of(parameter.grad))
        self._table.mean_written()

    def forget_mean(self) -> None:
        """The norm of `.grad` is out of date."""
        self._table.forget_mean()

    def norms(self, fires: Sequence[int]) -> Norms | None:
        """The norms, `[1]`; `None` where the weights of some parameter were not known."""
        if not self._known:
            return None
        samples, mean = self._table.squares(fires)
        return Norms(samples.sum()[None] * self._shards, None if mean is None else mean.sum()[None])

    def _weigh(self, out: Tensor, parameter: Tensor, grad: Tensor) -> None:
        """Write the weighed norm of `grad` (not squared) into `out`."""
        root = self._root(parameter, grad)
        if root is None:
            return
        torch.div(real_of(grad), root.divisor, out=root.divisor)
        norm_into(out, root.divisor)
        out.mul_(root.unit**0.5)

    def _root(self, parameter: Tensor, grad: Tensor) -> Root | None:
        """The divisor of one gradient; without v the window's weights are not known."""
        group, state = self._groups.get(id(parameter)), self._optimizer.state.get(parameter, {})
        v = None if group is None else state.get(f"max_{self._entry}" if group.get("amsgrad") else self._entry)
        if group is None or v is None:
            self._since = self._steps()
            self._known = False
            return None
        step = state["step"]
        on_device = isinstance(step, Tensor) and step.device.type != "cpu"
        unit = (1 - group["betas"][1] ** (step.double() if on_device else float(step))) ** 0.5
        v, grad = real_of(local_of(v)), real_of(grad)
        at_least = torch.promote_types(grad.dtype, torch.float32)
        divisor = torch.sqrt(v.to(grad.device, torch.promote_types(v.dtype, at_least)))
        return Root(divisor.add_(group["eps"] * unit).sqrt_(), unit)
