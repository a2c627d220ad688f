"""How a `Scaling` becomes the values of one optimizer step: learning rate, decays, weight decay, step counters.

One table says, for each class of torch.optim, how its learning rate follows the batch and which of its numbers are
memories counted in steps. Everything is changed for one `step()` and put back.
"""

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._errors import AnybatchWarning, InvalidValueError, UnsupportedError

Decays = Literal["clock", "constant"]

# Optimizers that have a controller: it scales them at every step, so nobody else may.
attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


@dataclass(frozen=True)
class Family:
    """What the theory says of an optimizer class.

    Args:
        exponent: power of the gain that multiplies the learning rate.
        decays: whether the class's own decays are on the clock by default.
        names: group entries that are decays, numbers or tuples of numbers: to the power of the iterations.
        rates: group entries that multiply the step count: times the iterations.
        state: state entries that count base iterations, each with its power of them.
        decoupled: whether the weight decay is decoupled although the group has no entry that says so.
        eps: power of the batch by which the size of what eps is added to falls.
        source: the paper of the exponent; empty where it was worked out here.
        least: beta2 on the clock must stay above it.
        off_clock: why the decays cannot be on the clock; empty where they can.
        warning: what a user should know at `attach`.
    """

    exponent: float
    decays: Decays
    names: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    state: Mapping[str, int] = field(default_factory=dict)
    decoupled: bool = False
    eps: float = 0.0
    source: str = ""
    least: float = 0.0
    off_clock: str = ""
    warning: str = ""


_SDE = "Malladi et al. 2022"
_ADAM = Family(0.5, "clock", ("betas",), state={"step": 1}, eps=0.5, source=_SDE)

# Every class of torch.optim: its row, or why it is refused. The exponent is what makes constant gradients under noise
# go equally far per base iteration at any batch (tests/test_optimizers.py): 1 where the step is proportional to the
# gradient; 1/2 where it is divided by its own running size, which the noise dominates (Malladi et al. 2022). Decays on
# the clock: docs/architecture.md. The momentum of RMSprop and of Muon stays as it is, as SGD's does by default.
_TABLE: dict[str, Family | str] = {
    "SGD": Family(1.0, "constant", ("momentum",), source="Goyal et al. 2017"),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    # momentum_decay multiplies the step count; the running product of its factors is forgotten within a few steps.
    "NAdam": Family(0.5, "clock", ("betas",), rates=("momentum_decay",), state={"step": 1}, eps=0.5),
    # Its average has the length 2 / (1 - beta2) - 1; it never divides by one of 5 or less.
    "RAdam": Family(0.5, "clock", ("betas",), state={"step": 1}, eps=0.5, least=2 / 3),
    "RMSprop": Family(0.5, "clock", ("alpha",), eps=0.5, source=_SDE),
    # The maximum of n noisy gradients grows with n: only with n counted in steps does it fall as one gradient's size.
    "Adamax": Family(
        0.5, "constant", eps=0.5, off_clock="it divides by a maximum, which grows with the number of gradients"
    ),
    "Adadelta": Family(0.5, "constant", off_clock="it averages its own updates, whose size depends on rho"),
    "SparseAdam": Family(
        0.5, "constant", eps=0.5, off_clock="a row's averages move when the row is used, not with the clock"
    ),
    # A sum grows by 1/r of its size in 1/r of the steps, so the step is r times as long by itself. In units of base
    # iterations the sum is r^2 times itself, which keeps it right while r changes.
    "Adagrad": Family(0.0, "clock", rates=("lr_decay",), state={"step": 1, "sum": 2}, eps=1.0),
    # Orthogonalised, so its length says nothing of the gradient's, as with a sign: 1/2. lr multiplies its weight decay.
    "Muon": Family(0.5, "clock", decoupled=True),
    # min(lr, 1/sqrt(step)): with the count on the clock the second one, too, is multiplied by sqrt(r).
    "Adafactor": Family(
        0.5,
        "clock",
        state={"step": 1},
        decoupled=True,
        warning="Adafactor steps by the smaller of lr and 1 / sqrt(step), so a higher lr may be cut. With its step "
        "count on the clock that bound grows by the square root of the iterations and no further: keep to AdaScale(), "
        "SquareRoot() and decays='clock', or train with AdamW.",
    ),
    "Rprop": "its steps do not depend on the learning rate after the first",
    "ASGD": "it applies a learning rate one step late",
    "LBFGS": "it takes differences of gradients for curvature, and its step length from a line search",
}
_CLASSES = {getattr(torch.optim, name): row for name, row in _TABLE.items() if hasattr(torch.optim, name)}


def row_of(optimizer: Optimizer) -> Family | None:
    """The table's row for `optimizer`; `None` where its class is unknown.

    Raises:
        UnsupportedError: scaling has no meaning for this class.
    """
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise UnsupportedError("ZeroRedundancyOptimizer(overlap_with_ddp=True) never calls step(): use False.")
    local = local_of(optimizer)
    for cls in type(local).__mro__:
        row = _CLASSES.get(cls)
        if isinstance(row, str):
            raise UnsupportedError(f"{type(local).__name__} cannot be scaled: {row}.")
        if row is not None:
            return row
    return None


def family_of(optimizer: Optimizer, *, exponent: float | None) -> Family:
    """The table's row for `optimizer`, or a row for a stated `exponent`.

    Raises:
        UnsupportedError: scaling has no meaning for this class, or it is unknown and no exponent is stated.
    """
    row = row_of(optimizer)
    if row is not None:
        if row.warning:
            warnings.warn(row.warning, AnybatchWarning, stacklevel=4)
        return row
    if exponent is not None:
        return Family(exponent, "constant", off_clock="which of its entries are decays is not known")
    known = ", ".join(sorted(cls.__name__ for cls, row in _CLASSES.items() if isinstance(row, Family)))
    raise UnsupportedError(
        f"How the learning rate of {type(local_of(optimizer)).__name__} follows the batch is not known (known: "
        f"{known}). State it: rule=anybatch.AdaScale(exponent=1) if its step is proportional to the gradient, "
        "exponent=0.5 if the gradient is divided by its own running size."
    )


def check_decays(optimizer: Optimizer, family: Family, decays: Decays) -> None:
    """Refuse decays on the clock where they cannot be right."""
    if decays == "constant":
        return
    if family.off_clock:
        raise UnsupportedError(
            f"The decays of {type(local_of(optimizer)).__name__} cannot be on the clock: {family.off_clock}. Use "
            "decays='constant'."
        )
    for group in optimizer.param_groups:
        if _is_sgd(family) and group["momentum"] and (group["nesterov"] or group["dampening"]):
            raise InvalidValueError(
                "SGD's momentum can be on the clock only without nesterov and dampening, "
                f"got nesterov={group['nesterov']}, dampening={group['dampening']}: use decays='constant'."
            )


@contextmanager
def scaled(
    optimizer: Optimizer, family: Family, *, lr_factor: float, iterations: float, decays: Decays
) -> Iterator[None]:
    """Hold the values of a step of `iterations` base iterations in `optimizer`, then put the base values back.

    The learning rate is multiplied by `lr_factor`. With decays on the clock and k = `iterations`:

        betas, alpha -> beta ** k, alpha ** k
        momentum m   -> m ** k for SGD, and the gradient enters the buffer times (1 - m ** k) / (1 - m)
        lr_decay     -> times k, and NAdam's momentum_decay: what multiplies the step count
        weight decay -> times k / lr_factor, where it is decoupled, so that lr * weight_decay moves by k
        step count   -> in base iterations, so that a debiasing by 1 - beta ** step is exact while k changes
        Adagrad sum  -> of base iterations, k ** 2 times that of steps

    The buffer of SGD is thereby the same running sum of base iterations whatever k is. A learning rate held in a tensor
    is changed in place, and keeps its identity.

    Raises:
        InvalidValueError: so many iterations in one step leave RAdam no average to divide by.
    """
    if lr_factor == 1 and (iterations == 1 or decays == "constant"):
        yield  # nothing changes, bit for bit
        return
    k = iterations if decays == "clock" else 1.0
    groups = list(optimizer.param_groups)
    if (local := local_of(optimizer)) is not optimizer:
        groups += local.param_groups  # a closure runs after these were synchronised with the outer ones
    changes = [_scaled_values(group, family, lr_factor, k) for group in groups]
    # All are read before any is written: groups may share one tensor.
    saved = [{name: _copy(group[name]) for name in values} for group, values in zip(groups, changes, strict=True)]
    if k != 1 and _is_sgd(family):
        _prepare_momentum(optimizer)
    for entries, power in _state_entries(optimizer, family, k):
        torch._foreach_div_(entries, k**power)  # not times 1 / k: rounding that would be one-sided for a constant k
    try:
        for group, values in zip(groups, changes, strict=True):
            _assign(group, values)
        yield
    finally:
        for group, values in zip(groups, saved, strict=True):
            _assign(group, values)
        for entries, power in _state_entries(optimizer, family, k):
            torch._foreach_mul_(entries, k**power)


def _scaled_values(group: dict[str, Any], family: Family, lr_factor: float, k: float) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    if lr_factor != 1:
        changed["lr"] = group["lr"] * lr_factor
    if k == 1:
        return changed
    for name in family.names:
        value = group[name]
        changed[name] = tuple(beta**k for beta in value) if isinstance(value, tuple | list) else value**k
    for name in family.rates:
        changed[name] = group[name] * k
    if family.least and changed["betas"][1] <= family.least:
        raise InvalidValueError(
            f"beta2={group['betas'][1]} over the {k:.4g} base iterations of this step is "
            f"{float(changed['betas'][1]):.3g}; RAdam needs more than {family.least:.3g}. Use decays='constant', or "
            "AdamW."
        )
    if _is_sgd(family):
        momentum = group["momentum"]
        changed["dampening"] = 1 - (1 - momentum**k) / (1 - momentum) if momentum else group["dampening"]
    decoupled = family.decoupled or group.get("decoupled_weight_decay")
    if decoupled and group.get("weight_decay") and lr_factor:
        changed["weight_decay"] = group["weight_decay"] * (k / lr_factor)
    return changed


def _is_sgd(family: Family) -> bool:
    return family.names == ("momentum",)


def local_of(optimizer: Optimizer) -> Optimizer:
    """What holds the state: the optimizer itself, or the one that a ZeroRedundancyOptimizer runs on this rank's shard.

    By name: importing torch.distributed.optim warns of torch.jit, and not every build of torch has it.
    """
    sharded = any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__)
    return optimizer.optim if sharded else optimizer  # type: ignore[attr-defined]


def _prepare_momentum(optimizer: Optimizer) -> None:
    """Give SGD zero buffers: its first step would take the gradient without the dampening."""
    local = local_of(optimizer)
    for group in local.param_groups:
        if not group["momentum"]:
            continue
        for parameter in group["params"]:
            if parameter.grad is None or parameter.grad.is_sparse:
                continue
            state = local.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _state_entries(optimizer: Optimizer, family: Family, k: float) -> Iterator[tuple[list[Tensor], int]]:
    for name, power in family.state.items() if k != 1 else ():
        entries = [s[name] for s in local_of(optimizer).state.values() if isinstance(s.get(name), Tensor)]
        if entries:
            yield entries, power


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _assign(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(group[name], Tensor):
            group[name].copy_(value)
        else:
            group[name] = value
