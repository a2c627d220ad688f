"""Adam's own metric: squared norms in which each coordinate has the weight that Adam gives it.

    ||g||^2_P = sum_i g_i^2 / (sqrt(v_i / c) + eps)        c = 1 - beta2 ** step

with v the second moment as it stands before the step, which one window of micro-batches shares, and c its debiasing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._gradients.norms import norm_into, real_of, total_squared_norm
from anybatch._gradients.witness import local_of

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


class Metric:
    """The weights that an optimizer of the Adam family has for its parameters.

    Args:
        optimizer: whose state is read.
        entry: the name of v in it; AMSGrad's maximum of it is found by itself.
        steps: gives the number of steps taken.
        part: for a parameter, the rows of its gradient on a leaf for which this rank holds v; `None` for all.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        entry: str,
        steps: Callable[[], int],
        part: Callable[[Tensor], slice | None] = lambda _: None,
    ) -> None:
        self._optimizer = optimizer
        self._entry = entry
        self._steps = steps
        self._part_of = part
        self._parts: dict[Tensor, slice | None] = {}
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._since = 0  # steps after which the youngest v has begun

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Weigh `parameters` too, once they have been trained for a while."""
        self._parts.update((p, self._part_of(p)) for p in parameters)
        self._since = self._steps()

    def open(self) -> bool:
        """A window begins: whether it can be weighed. By the number of steps, as reading every parameter's own count
        would wait for the device where it lies there.
        """
        self._groups = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        return self._steps() - self._since >= SQUARES

    def sample_into(self, out: Tensor, parameter: Tensor, grad: Tensor) -> bool:
        """Write the weighed norm (not squared) of a micro-batch's gradient into `out`; false where there is no v."""
        part = self._parts[parameter]
        return self._weigh(out, parameter, grad if part is None else grad[part])

    def grad_into(self, out: Tensor, parameter: Tensor) -> bool:
        """Write the weighed norm of this rank's part of `.grad` into `out`; false where there is no v."""
        if parameter.grad is None:
            out.zero_()
            return True
        return self._weigh(out, parameter, local_of(parameter.grad))

    def samples_square(self, parameter: Tensor, samples: Tensor) -> Tensor | None:
        """Sum of the weighed squared norms of `samples`, shape `[n, *shape]`; `None` where there is no v."""
        root = self._root(parameter, samples)
        if root is None:
            return None
        return total_squared_norm([real_of(samples) / root.divisor]) * root.unit

    def _weigh(self, out: Tensor, parameter: Tensor, grad: Tensor) -> bool:
        root = self._root(parameter, grad)
        if root is None:
            return False
        torch.div(real_of(grad), root.divisor, out=root.divisor)
        norm_into(out, root.divisor)
        out.mul_(root.unit**0.5)
        return True

    def _root(self, parameter: Tensor, grad: Tensor) -> Root | None:
        group, state = self._groups.get(parameter), self._optimizer.state.get(parameter, {})
        v = None if group is None else state.get(f"max_{self._entry}" if group.get("amsgrad") else self._entry)
        if group is None or v is None:
            self._since = self._steps()
            return None
        step = state["step"]
        on_device = isinstance(step, Tensor) and step.device.type != "cpu"
        unit = (1 - group["betas"][1] ** (step.double() if on_device else float(step))) ** 0.5
        v, grad = real_of(local_of(v)), real_of(grad)
        at_least = torch.promote_types(grad.dtype, torch.float32)
        divisor = torch.sqrt(v.to(grad.device, torch.promote_types(v.dtype, at_least)))
        return Root(divisor.add_(group["eps"] * unit).sqrt_(), unit)
