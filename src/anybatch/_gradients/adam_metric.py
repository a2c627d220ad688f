"""Norms in Adam's own metric: each coordinate has the weight that Adam gives it.

    ||g||^2_P = sum_i g_i^2 / (sqrt(v_i / c) + eps)        c = 1 - beta2 ** step.

The second moment v is the one before the step, the same for all micro-batches of the window. Its debiasing is c.
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

# Least number of squares in each v. The relative error of an average of k squares is sqrt(2 / k), here 0.45. With one
# or two squares 1 / sqrt(v) has no finite variance.
SQUARES = 10


@dataclass(frozen=True)
class Root:
    """The divisor of one parameter's gradient: `||g||^2_P = unit * ||g / divisor||^2`."""

    divisor: Tensor  # sqrt(sqrt(v) + eps * sqrt(c)), a new tensor
    unit: float | Tensor  # sqrt(c); a tensor of shape `[]` where the step count is on the device


class AdamNorms(Probe):
    """The norms of a window in the metric of an optimizer of the Adam family.

    Under FSDP2 each rank weighs its own shard of its own micro-batches. Micro-batches are exchangeable, so the same
    shard of the other ranks' gradients has the same expected norm. `rows` and `shards` are those of `Engine`. Under
    tensor parallelism it is a shard of the rank's part.
    """

    name = "adam"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        entry: str,  # the name of v in the optimizer's state; with AMSGrad its maximum is read instead
        steps: Callable[[], int],  # the number of steps taken
        rows: Callable[[Tensor, Tensor], slice | None] = lambda _, __: None,
        shards: int = 1,
    ) -> None:
        self._optimizer = optimizer
        self._entry = entry
        self._steps = steps
        self._rows_of = rows
        self._shards = shards
        self._since = 0  # number of steps before the first square of the newest v
        self.drop()

    def drop(self) -> None:
        """Drop all parameters."""
        self._rows: list[slice | None] = []
        self._unmeasured: set[int] = set()  # the identities of parameters without a part of the norms
        self._table = Table()
        self._groups: dict[int, dict[str, Any]] = {}  # by the identity of a parameter
        self._known = False  # whether the weights of the window are known

    def follow(self, parameters: Sequence[Tensor], places: Sequence[Placement]) -> None:
        """Measure these parameters as well, once each v has enough squares."""
        for parameter, place in zip(parameters, places, strict=True):
            self._rows.append(self._rows_of(parameter, place.leaf) if place.measured else None)
            if not place.measured:
                self._unmeasured.add(id(parameter))
        self._table.follow(places)
        self._since = self._steps()
        self._known = False

    def open(self, *, sampled: bool) -> bool:
        """Begin a window, and measure it if v is old enough."""
        self._table.clear()
        self._groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        # The controller's number of steps: a parameter's own count may be on a device, and a read would synchronise.
        self._known = sampled and self._steps() - self._since >= SQUARES
        return sampled

    def sample(self, row: int, index: int, parameter: Tensor, grad: Tensor) -> None:
        """Measure the gradient that `parameter` got from micro-batch `row`."""
        if not self._known:
            return
        rows = self._rows[index]
        self._weigh(self._table.cell(row, index), parameter, grad if rows is None else grad[rows])

    def samples(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Measure all gradients of a window at once."""
        squares = []
        for parameter, samples in zip(parameters, gradients, strict=True):
            root = self._root(parameter, samples) if self._known else None
            if root is None:
                return
            squares.append(total_squared_norm([real_of(samples) / root.divisor]) * root.unit)
        self._table.observe(squares, gradients[0].shape[0])

    def mean(self, parameters: Sequence[Tensor]) -> None:
        """Measure this rank's part of `.grad`."""
        if self._known:
            self._table.write_mean(parameters, self._weigh)

    def forget_mean(self) -> None:
        """Drop the norm of `.grad`."""
        self._table.forget_mean()

    def norms(self, fires: Sequence[int]) -> Norms | None:
        """The norms, `[1]`; `None` where the weights of a parameter are not known."""
        if not self._known:
            return None
        samples, mean = self._table.squares(fires)
        return Norms(samples.sum()[None] * self._shards, None if mean is None else mean.sum()[None])

    def _weigh(self, out: Tensor, parameter: Tensor, grad: Tensor) -> None:
        """Write the weighted norm of `grad` (not squared) into `out`."""
        if id(parameter) in self._unmeasured:
            out.zero_()
            return
        root = self._root(parameter, grad)
        if root is None:
            return
        torch.div(real_of(grad), root.divisor, out=root.divisor)
        norm_into(out, root.divisor)
        out.mul_(root.unit**0.5)

    def _root(self, parameter: Tensor, grad: Tensor) -> Root | None:
        """The divisor of one gradient; `None` without v, and then the window is not measured."""
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
