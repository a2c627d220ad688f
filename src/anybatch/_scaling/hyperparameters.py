"""How a `Scaling` becomes the values of one optimizer step: learning rate, decays, weight decay, step counters.

Everything is changed for one `step()` and put back. `families` says what is true of a class, `momentum` what becomes of
a momentum.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._errors import InvalidValueError, UnsupportedError
from anybatch._scaling.families import Family, local_of
from anybatch._scaling.momentum import Decays, automatic, averaged_exponent, clock_power, momentum_at


@dataclass(frozen=True)
class Hyperparameters:
    """What becomes of an optimizer's values in a step of `iterations` base iterations.

    Args:
        optimizer: the user's own.
        family: what the theory says of its class.
        decays: as in `Rule`.
        total: base iterations of the whole run, or `None`.

    Raises:
        InvalidValueError: a momentum of 1 or more, unless decays are constant.
        UnsupportedError: decays on the clock where they cannot be right; a group without a learning rate.
    """

    optimizer: Optimizer
    family: Family
    decays: Decays
    total: float | None

    def __post_init__(self) -> None:
        if any("lr" not in group for group in self.optimizer.param_groups):
            raise UnsupportedError(
                f"{type(local_of(self.optimizer)).__name__} has a parameter group without a learning rate, its entry "
                "'lr', so there is nothing to scale."
            )
        forever = [g for g in self.optimizer.param_groups if self.family.momentum and g.get("momentum", 0) >= 1]
        if forever and self.decays not in ("constant", 0):
            raise InvalidValueError(
                f"A momentum of {forever[0]['momentum']:g} never forgets, so it has no length in base iterations: use "
                "one below 1, or decays='constant'."
            )
        if self.decays in ("auto", "constant") or self.decays == 0:
            return
        name = type(local_of(self.optimizer)).__name__
        if self.family.off_clock:
            raise UnsupportedError(
                f"The decays of {name} cannot be on the clock: {self.family.off_clock}. Use decays='constant'."
            )
        if self.family.momentum == "mean" and self.decays not in ("clock", 1):
            raise UnsupportedError(
                f"{name} normalises after its momentum, so its learning rate and its momentum follow the batch "
                f"together or not at all: use decays='clock' or 'constant', got {self.decays!r}."
            )

    def exponent(self, iterations: float) -> float:
        """Power of `iterations` that multiplies the learning rate."""
        if self.family.momentum != "mean" or self._power(iterations) == 1:
            return self.family.exponent
        return averaged_exponent(iterations, float(self.optimizer.param_groups[0]["momentum"]))

    @contextmanager
    def scaled(self, *, lr_factor: float, iterations: float, scale: float = 1.0) -> Iterator[None]:
        """Hold the values of a step of `iterations` base iterations at `scale`, then put the base values back, but for
        what somebody else has written in between.

        The learning rate is multiplied by `lr_factor`. With decays on the clock and k = `iterations`, or `iterations **
        decays`:

            betas, alpha -> beta ** k, alpha ** k
            momentum     -> as `momentum_at` says, with the gradient's weight that keeps lr / (1 - momentum)
            lr_decay     -> times k, and NAdam's momentum_decay: what multiplies the step count
            weight decay -> times k / lr_factor, where it is decoupled, so that lr * weight_decay moves by k
            step count   -> in units of k, so that a debiasing by 1 - beta ** step is exact while k changes
            Adagrad sum  -> of base iterations, k ** 2 times that of steps

        A buffer of momentum is the same running sum of base iterations whatever k is. A learning rate held in a tensor
        is changed in place, and keeps its identity.

        Raises:
            InvalidValueError: so many iterations in one step leave RAdam no average to divide by.
        """
        k = self._power(iterations)
        groups = list(self.optimizer.param_groups)
        if (local := local_of(self.optimizer)) is not self.optimizer:
            groups += local.param_groups  # a closure runs after these were synchronised with the outer ones
        momenta = [self._momentum(group, iterations, scale) for group in groups]
        changes = [self._values(group, lr_factor, k, m) for group, m in zip(groups, momenta, strict=True)]
        if not any(changes):
            yield  # nothing changes, bit for bit
            return
        # All are read before any is written: groups may share one tensor.
        saved = [{name: _copy(group[name]) for name in values} for group, values in zip(groups, changes, strict=True)]
        own = momenta[-len(local.param_groups) :]  # those of the groups that hold the state
        for group, momentum in zip(local.param_groups, own, strict=True):
            self._prepare_momentum(group, momentum)
        for entries, divisor in self._state_entries(k, own):
            torch._foreach_div_(entries, divisor)  # not times 1 / k: rounding that would be one-sided for a constant k
        written: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for group, values in zip(groups, changes, strict=True):
                _assign(group, values)
                written += [(group, name, None) for name in values]
            written = [(group, name, _mark(group[name])) for group, name, _ in written]
            yield
        finally:
            # After a step that raised this comes late: what a user has set since then is his.
            his = {(id(group), name) for group, name, mark in written if _mark(group[name]) != mark}
            for group, values in zip(groups, saved, strict=True):
                _assign(group, {n: value for n, value in values.items() if (id(group), n) not in his})
            for entries, divisor in self._state_entries(k, own):
                torch._foreach_mul_(entries, divisor)

    @property
    def _on_clock(self) -> bool:
        """Whether averages, step counts and a decoupled weight decay follow the clock."""
        return (self.family.decays if self.decays == "auto" else self.decays) not in ("constant", 0)

    def _power(self, iterations: float) -> float:
        """Base iterations by which the averages of the class move: betas, alpha, step counts."""
        return clock_power(self.family.decays if self.decays == "auto" else self.decays, iterations)

    def _momentum(self, group: dict[str, Any], iterations: float, scale: float) -> float:
        """The group's momentum in this step."""
        momentum: float = group.get("momentum", 0.0)
        if not momentum or not self.family.momentum:
            return momentum
        decays = self.decays
        if decays == "auto" and self.family.momentum == "mean":
            decays = self.family.decays
        elif decays == "auto":
            decays = automatic(momentum, scale=scale, total=self.total)
        return momentum_at(momentum, iterations, decays=decays)

    def _values(self, group: dict[str, Any], lr_factor: float, k: float, momentum: float) -> dict[str, Any]:
        family = self.family
        changed: dict[str, Any] = {}
        if lr_factor != 1:
            changed["lr"] = group["lr"] * lr_factor
        if momentum != group.get("momentum", 0.0):
            changed["momentum"] = momentum
            if family.momentum == "sum":
                entering = _entering(group, momentum)
                if _damps(group):
                    changed["dampening"] = 1 - (1 - group["dampening"]) * entering
                else:
                    changed["lr"] = group["lr"] * (lr_factor * entering)
        decoupled = family.decoupled or group.get("decoupled_weight_decay")
        if self._on_clock and decoupled and group.get("weight_decay") and lr_factor and k != lr_factor:
            changed["weight_decay"] = group["weight_decay"] * (k / lr_factor)
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
                f"{float(changed['betas'][1]):.3g}; RAdam needs more than {family.least:.3g}. Use decays='constant', "
                "or AdamW."
            )
        return changed

    def _prepare_momentum(self, group: dict[str, Any], momentum: float) -> None:
        """Give SGD zero buffers: its first step would take the gradient without the dampening."""
        if self.family.momentum != "sum" or momentum == group["momentum"] or not _damps(group):
            return
        for parameter in group["params"]:
            if parameter.grad is None or parameter.grad.is_sparse:
                continue
            state = local_of(self.optimizer).state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def _state_entries(self, k: float, momenta: Sequence[float]) -> Iterator[tuple[list[Tensor], float]]:
        """State that is kept in another unit than this step's, with what divides it."""
        local = local_of(self.optimizer)
        for name, power in self.family.state.items() if k != 1 else ():
            entries = [s[name] for s in local.state.values() if isinstance(s.get(name), Tensor)]
            if entries:
                yield entries, k**power
        if self.family.momentum != "sum":
            return
        for group, momentum in zip(local.param_groups, momenta, strict=True):
            if not group["momentum"] or momentum == group["momentum"] or _damps(group):
                continue
            states = [local.state[p] for p in group["params"] if p in local.state]
            entries = [s["momentum_buffer"] for s in states if isinstance(s.get("momentum_buffer"), Tensor)]
            if entries:
                yield entries, _entering(group, momentum)


def _entering(group: dict[str, Any], momentum: float) -> float:
    """The gradient's weight as it enters a buffer of `momentum`, with which lr / (1 - momentum) stays the base's."""
    return (1 - momentum) / (1 - float(group["momentum"]))


def _damps(group: dict[str, Any]) -> bool:
    """Whether the gradient's weight can be a dampening: SGD's without Nesterov, which would take it unweighted."""
    return "dampening" in group and not group["nesterov"]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _mark(value: Any) -> Any:
    """What tells whether `value` is still what was written; a tensor's version, as its number may lie on a device."""
    return (id(value), value._version) if isinstance(value, Tensor) else value


def _assign(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(group[name], Tensor):
            group[name].copy_(value)
        else:
            group[name] = value
