"""How a `Scaling` becomes the values of one optimizer step: learning rate, decays, weight decay, step counters.

One table says, for each optimizer class, how its learning rate follows the batch and which of its numbers are memories
counted in steps. Everything is changed for one `step()` and put back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._errors import InvalidValueError, UnsupportedError

Decays = Literal["clock", "constant"]


@dataclass(frozen=True)
class Family:
    """What the theory says of an optimizer class.

    Args:
        exponent: power of the gain that multiplies the learning rate.
        decays: whether the class's own decays are on the clock by default.
        names: the group entries that are decays, numbers or tuples of numbers.
        counts: whether the state holds a `step` for debiasing, which then must count base iterations.
    """

    exponent: float
    decays: Decays
    names: tuple[str, ...] = ()
    counts: bool = False


# The square root for the Adam family: Malladi et al. 2022; its decays on the clock: docs/architecture.md, "Decays".
_FAMILIES: dict[type[Optimizer], Family] = {
    torch.optim.SGD: Family(1.0, "constant", ("momentum",)),
    torch.optim.Adam: Family(0.5, "clock", ("betas",), counts=True),
    torch.optim.AdamW: Family(0.5, "clock", ("betas",), counts=True),
    torch.optim.RMSprop: Family(0.5, "clock", ("alpha",)),
    torch.optim.Adagrad: Family(0.5, "constant"),
}
_REFUSED: dict[type[Optimizer], str] = {
    torch.optim.Rprop: "its steps do not depend on the learning rate after the first",
    torch.optim.ASGD: "it applies a learning rate one step late",
    torch.optim.LBFGS: "its step length comes from a line search over several gradients",
}


def family_of(optimizer: Optimizer, *, exponent: float | None) -> Family:
    """The table's row for `optimizer`, or a row for a stated `exponent`.

    Raises:
        UnsupportedError: scaling has no meaning for this class, or it is unknown and no exponent is stated.
    """
    for cls in type(optimizer).__mro__:
        if cls in _REFUSED:
            raise UnsupportedError(f"{type(optimizer).__name__} cannot be scaled: {_REFUSED[cls]}.")
        if cls in _FAMILIES:
            return _FAMILIES[cls]
    if exponent is not None:
        return Family(exponent, "constant")
    known = ", ".join(sorted(cls.__name__ for cls in _FAMILIES))
    raise UnsupportedError(
        f"How the learning rate of {type(optimizer).__name__} follows the batch is not known (known: {known}). State "
        f"it: rule=anybatch.AdaScale(exponent=1) if its step is proportional to the gradient, exponent=0.5 if the "
        f"gradient is divided by its own running size."
    )


def check_decays(optimizer: Optimizer, family: Family, decays: Decays) -> None:
    """Refuse decays on the clock where they cannot be right."""
    if decays == "constant":
        return
    if not family.names:
        raise UnsupportedError(
            f"Which decays of {type(optimizer).__name__} belong on the clock is not known: use decays='constant'."
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

        beta, alpha  -> beta ** k, alpha ** k
        momentum m   -> m ** k, and the gradient enters the buffer times (1 - m ** k) / (1 - m)
        weight decay -> times k / lr_factor, where it is decoupled, so that lr * weight_decay moves by k
        step count   -> in base iterations, so that a debiasing by 1 - beta ** step is exact while k changes

    The buffer of SGD is thereby the same running sum of base iterations whatever k is. A learning rate held in a tensor
    is changed in place, and keeps its identity.
    """
    if lr_factor == 1 and (iterations == 1 or decays == "constant"):
        yield  # nothing changes, bit for bit
        return
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    on_clock = decays == "clock" and iterations != 1
    try:
        for group in optimizer.param_groups:
            changed = _scaled_values(group, family, lr_factor, iterations if on_clock else 1.0)
            saved.append((group, {name: _copy(group[name]) for name in changed}))
            for name, value in changed.items():
                _assign(group, name, value)
        if on_clock and _is_sgd(family):
            _prepare_momentum(optimizer)
        if on_clock and family.counts:
            counters = _counters(optimizer)
            if counters:
                torch._foreach_div_(counters, iterations)
        yield
    finally:
        for group, values in saved:
            for name, value in values.items():
                _assign(group, name, value)
        if on_clock and family.counts:
            counters = _counters(optimizer)
            if counters:
                torch._foreach_mul_(counters, iterations)


def _scaled_values(group: dict[str, Any], family: Family, lr_factor: float, k: float) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    if lr_factor != 1:
        changed["lr"] = group["lr"] * lr_factor
    if k == 1:
        return changed
    for name in family.names:
        value = group[name]
        changed[name] = tuple(beta**k for beta in value) if isinstance(value, tuple | list) else value**k
    if _is_sgd(family):
        momentum = group["momentum"]
        changed["dampening"] = 1 - (1 - momentum**k) / (1 - momentum) if momentum else group["dampening"]
    if group.get("decoupled_weight_decay") and group.get("weight_decay"):
        changed["weight_decay"] = group["weight_decay"] * (k / lr_factor)
    return changed


def _is_sgd(family: Family) -> bool:
    return family.names == ("momentum",)


def _prepare_momentum(optimizer: Optimizer) -> None:
    """Give SGD zero buffers: its first step would take the gradient without the dampening."""
    for group in optimizer.param_groups:
        if not group["momentum"]:
            continue
        for parameter in group["params"]:
            if parameter.grad is None or parameter.grad.is_sparse:
                continue
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _counters(optimizer: Optimizer) -> list[Tensor]:
    states = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state)
    return [state["step"] for state in states if isinstance(state.get("step"), Tensor)]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _assign(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group[name], Tensor):
        group[name].copy_(value)
    else:
        group[name] = value
