"""The settings of a run: the arguments of `attach`, checked once, as one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from anybatch._gradients import Reduction
from anybatch._record import Destination, RunRecord
from anybatch._scaling import AdaScale, BatchSize, Clock, Rule, ScheduleDriver, measurement_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `attach`, except for the optimizers, the model and the schedulers.

    Fields with `compare=False` may differ over the ranks. All others are compared when the controller is made.
    """

    rule: Rule
    batch: BatchSize
    total: float | None
    schedule_every: float
    reduction: Reduction
    grad_scaler: torch.amp.GradScaler | None
    leader: Clock | None = field(compare=False)  # the clock of another controller, which this run follows
    process_group: dist.ProcessGroup | None = field(compare=False)
    record: Sequence[Destination] = field(compare=False)
    pipeline: Any = field(default=None, compare=False)  # the schedule of torch.distributed.pipelining

    @property
    def measurement(self) -> AdaScale | None:
        """How the gain is measured; `None` under a rule that does not measure."""
        return measurement_of(self.rule)

    @property
    def counts(self) -> bool:
        """Whether backwards are counted."""
        return self.measurement is not None or self.batch.counts or self.reduction != "mean"

    @property
    def per_layer(self) -> int | None:
        """The number k of the first `RunRecord` with `per_layer=k`: every k steps the noise is measured by layer."""
        asked = (each.per_layer for each in self.record if isinstance(each, RunRecord))
        return next((number for number in asked if number is not None), None)

    def loss_scale(self) -> Tensor | None:
        """The factor on the loss, a tensor of shape `[]`; `None` where there is none."""
        return getattr(self.grad_scaler, "_scale", None)

    def shared(self) -> dict[str, object]:
        """The settings that must be the same on every rank, by their names in `attach`."""
        found: dict[str, object] = {}
        for each in (each for each in fields(self) if each.compare):
            value = getattr(self, each.name)
            if isinstance(value, BatchSize):
                found |= {name: number for name, number in vars(value).items() if name != "micro_batch"}
            else:
                found[each.name] = _comparable(value)
        return found


def optimizer_settings(optimizers: Sequence[Optimizer]) -> dict[str, object]:
    """Every number in the groups of the optimizers, and the sizes of their parameters, to compare over the ranks."""
    found: dict[str, object] = {"optimizer": ", ".join(type(optimizer).__name__ for optimizer in optimizers)}
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            of = (f" of optimizer {i}" if len(optimizers) > 1 else "") + (f", group {j}" if j else "")
            found[f"number of trained parameters{of}"] = sum(p.numel() for p in group["params"] if p.requires_grad)
            found |= {
                f"{name}{of}": _comparable(value)
                for name, value in group.items()
                if name not in ("params", "param_names")
            }
    return found


def schedule_settings(drivers: Sequence[ScheduleDriver]) -> dict[str, object]:
    """Every number in the states of the schedulers, to compare over the ranks."""
    found: dict[str, object] = {}
    for i, driver in enumerate(drivers):
        of = f" of scheduler {i}" if i else " of the scheduler"
        found |= {f"{name}{of}": _comparable(value) for name, value in driver.state().items()}
    return found


def _comparable(value: Any) -> object:
    """`value` as numbers and text, equal on two ranks where the value is the same."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() == 1 else f"a tensor of shape {list(value.shape)}"
    if value is None or isinstance(value, Real | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _comparable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(each) for each in value]
    if isinstance(value, Rule):
        return repr(value)
    return type(value).__name__  # an object's repr may hold its address
