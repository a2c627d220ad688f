"""Norms in Adam's own metric: each coordinate has the weight that Adam gives it.

    ||g||^2_P = sum_i g_i^2 / (sqrt(v_i / c) + eps)        c = 1 - beta2 ** step.

The second moment v is the one before the step, the same for all micro-batches of the window. Its debiasing is c.

[Note: unit] With the unit u = sqrt(c) this is `u sum_i g_i^2 / (sqrt(v_i) + eps u)`. A unit on the host is a factor of
the whole sum. A fused optimizer has its step counts on the device: there each gradient is divided by its own unit.

[Note: launches] A large gradient is weighted as it comes, and condensed to the norms of its rows. Small ones are
flattened at the end of the backward, and take as many operations together as a large one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._gradients.autograd import record_readers, stream_of
from anybatch._gradients.norms import (
    SMALL,
    blocks,
    condensed,
    flat,
    local_of,
    part_of,
    real_of,
    summed,
    total_squared_norm,
)
from anybatch._gradients.probe import Placement, Probe
from anybatch._gradients.window import Norms

# Least number of squares in each v. The relative error of an average of k squares is sqrt(2 / k), here 0.45. With one
# or two squares 1 / sqrt(v) has no finite variance.
SQUARES = 10


@dataclass(frozen=True)
class Metric:
    """The metric of one parameter in a window."""

    v: Tensor
    eps: float
    unit: float | Tensor  # a tensor of shape `[]` where the step count is on the device


class Alike(NamedTuple):
    """What gradients share that are flattened together, or summed before a factor."""

    device: torch.device
    eps: float
    unit: float | None  # `None` on the device
    copies: float  # number of ranks with the same gradient


class WeightedSquares:
    """The sum of `||g||^2_P / copies` over gradients."""

    def __init__(self) -> None:
        self._held: dict[Alike, tuple[list[Metric], list[Tensor]]] = {}
        self._rows: dict[Alike, list[Tensor]] = {}  # norms of rows of weighted gradients
        self._sums: list[Tensor] = []
        self._streams: set[tuple[torch.device, int]] = set()  # of the gradients, on devices

    def add(self, metric: Metric, grad: Tensor, *, copies: float, held: bool) -> None:
        """Add a gradient; one that is `held` is read by `measure`, after which its owner may change it."""
        grad = real_of(grad)
        alike = Alike(grad.device, metric.eps, None if isinstance(metric.unit, Tensor) else metric.unit, copies)
        if grad.is_cuda:
            self._streams.add((grad.device, stream_of(grad.device)))
        if held:
            metrics, grads = self._held.setdefault(alike, ([], []))
            metrics.append(metric)
            grads.append(grad)
        else:
            weighted = _roots(metric.v, metric.eps, metric.unit, grad).mul_(grad)
            self._rows.setdefault(alike, []).extend(condensed(weighted))

    def measure(self) -> None:
        """Read the gradients that are held."""
        for alike in dict.fromkeys([*self._rows, *self._held]):
            rows, (metrics, grads) = self._rows.get(alike, []), self._held.get(alike, ([], []))
            record_readers([*rows, *grads], self._streams)
            squares = total_squared_norm([*rows, *_flattened(metrics, grads)])
            self._sums.append(squares * ((1.0 if alike.unit is None else alike.unit) / alike.copies))
        self._held.clear()
        self._rows.clear()
        self._streams.clear()

    def total(self) -> Tensor:
        """The sum, a float64 tensor of shape `[]`."""
        self.measure()
        return summed(self._sums)


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
        self._copies: list[tuple[float, float]] = []  # of each parameter, as in Placement
        self._clear(known=False)

    def _clear(self, *, known: bool) -> None:
        self._known = known  # whether the metric of the window is known
        self._groups: dict[int, dict[str, Any]] = {}  # by the identity of a parameter
        self._metrics: dict[int, Metric] = {}  # by the same
        self._units: dict[int, Tensor] = {}  # by the same; of counts on a device
        self._samples = WeightedSquares()
        self._observed: Tensor | None = None
        self._mean: Tensor | None = None

    def follow(self, parameters: Sequence[Tensor], places: Sequence[Placement]) -> None:
        """Measure these parameters as well, once each v has enough squares."""
        for parameter, place in zip(parameters, places, strict=True):
            self._rows.append(self._rows_of(parameter, place.leaf) if place.measured else None)
            self._copies.append((place.sample_copies, place.mean_copies))
        self._since = self._steps()
        self._clear(known=False)

    def open(self, *, sampled: bool) -> bool:
        """Begin a window, and measure it if v is old enough."""
        # The controller's number of steps: a parameter's own count may be on a device, and a read would synchronise.
        self._clear(known=sampled and self._steps() - self._since >= SQUARES)
        self._groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        return sampled

    def sample(self, row: int, index: int, parameter: Tensor, grad: Tensor, *, held: bool) -> None:  # noqa: ARG002
        """Measure the gradient that `parameter` got from a micro-batch, at once or with all that are held."""
        copies, rows = self._copies[index][0], self._rows[index]
        if copies < inf and (metric := self._metric(parameter)) is not None:
            self._samples.add(metric, grad if rows is None else grad[rows], copies=copies, held=held)

    def measure(self) -> None:
        """Measure the gradients that are held."""
        self._samples.measure()

    def samples(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Measure all gradients of a window at once."""
        squares = []
        for parameter, samples in zip(parameters, map(real_of, gradients), strict=True):
            metric = self._metric(parameter)
            if metric is None:
                return
            # Each takes the unit as a tensor, whose factor is in the roots.
            unit = torch.as_tensor(metric.unit, dtype=torch.float64, device=samples.device)
            squares.append(total_squared_norm([samples * _roots(metric.v, metric.eps, unit, samples)]))
        self._observed = summed(squares) / gradients[0].shape[0] ** 2

    def mean(self, parameters: Sequence[Tensor]) -> None:
        """Measure this rank's part of `.grad`."""
        squares = WeightedSquares()
        for p, (_, copies) in zip(parameters, self._copies, strict=True):
            if p.grad is not None and copies < inf and (metric := self._metric(p)) is not None:
                grad = part_of(p.grad, p)
                squares.add(metric, grad, copies=copies, held=grad.numel() < SMALL and not grad.is_sparse)
        self._mean = squares.total() if self._known else None

    def forget_mean(self) -> None:
        """Drop the norm of `.grad`."""
        self._mean = None

    def norms(self, fires: Sequence[int]) -> Norms | None:  # noqa: ARG002
        """The norms, `[1]`; `None` where the metric of a parameter is not known."""
        if not self._known:
            return None
        samples = self._samples.total() if self._observed is None else self._observed
        return Norms(samples[None] * self._shards, None if self._mean is None else self._mean[None])

    def _metric(self, parameter: Tensor) -> Metric | None:
        """The metric of one parameter; `None` without v, and then the window is not measured."""
        key = id(parameter)
        if not self._known or key in self._metrics:
            return self._metrics.get(key) if self._known else None
        group, state = self._groups.get(key), self._optimizer.state.get(parameter, {})
        v = None if group is None else state.get(f"max_{self._entry}" if group.get("amsgrad") else self._entry)
        if group is None or v is None:
            self._since = self._steps()
            self._known = False
            return None
        step = state["step"]
        if _on_device(step):
            if key not in self._units:
                self._units |= self._units_of(group, step.device)
            unit = self._units[key]
        else:
            unit = (1 - group["betas"][1] ** float(step)) ** 0.5
        metric = self._metrics[key] = Metric(real_of(local_of(v)), group["eps"], unit)
        return metric

    def _units_of(self, group: dict[str, Any], device: torch.device) -> dict[int, Tensor]:
        """The units of all parameters of a group whose counts are on this device, by a few operations."""
        states = {id(p): self._optimizer.state.get(p, {}).get("step") for p in group["params"]}
        steps = {key: step for key, step in states.items() if isinstance(step, Tensor) and step.device == device}
        units = (1 - group["betas"][1] ** torch.stack(list(steps.values())).double()).sqrt()
        return dict(zip(steps, units.unbind(), strict=True))


def _on_device(step: Any) -> bool:
    """Whether a count of steps is where a read synchronises."""
    return isinstance(step, Tensor) and step.device.type != "cpu"


def _roots(v: Tensor, eps: float, unit: float | Tensor, grad: Tensor) -> Tensor:
    """The roots of the weights, in a new tensor; without the factor of a unit on the host."""
    at_least = torch.promote_types(grad.dtype, torch.float32)
    roots = v.to(grad.device, torch.promote_types(v.dtype, at_least)).sqrt()
    roots = roots.add_(eps * unit) if not isinstance(unit, Tensor) else roots.div_(unit).add_(eps)
    return roots.rsqrt_()


def _flattened(metrics: Sequence[Metric], grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """The weighted gradients in blocks, each flat; the metrics have the same eps, and units of one kind."""
    begin = 0
    for block in blocks(grads):
        of = metrics[begin : begin + len(block)]
        begin += len(block)
        units = [m.unit.expand(g.numel()) for m, g in zip(of, block, strict=True) if isinstance(m.unit, Tensor)]
        grad = flat(block)
        v = flat([m.v.to(grad.device) for m in of])
        yield _roots(v, of[0].eps, torch.cat(units) if units else of[0].unit, grad).mul_(grad)
