"""How a `Scaling` becomes the values of one optimizer step: learning rate, decays, weight decay, step counters.

Everything is changed for one `step()` and put back. `families` says what is true of a class, `momentum` what becomes of
a momentum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._errors import InvalidValueError, UnsupportedError
from anybatch._scaling.families import Family, local_of
from anybatch._scaling.momentum import (
    Decays,
    automatic,
    averaged_exponent,
    clock_power,
    interpolated_exponent,
    momentum_at,
)


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
        UnsupportedError: decays on the clock where they cannot be right; a group without a learning rate, or with one
            that is no number.
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
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], bool) or not isinstance(group["lr"], Real | Tensor):
                raise UnsupportedError(
                    f"{type(local_of(self.optimizer)).__name__} has the learning rate lr={group['lr']!r}, so there is "
                    "nothing to scale: give it a number, or use an optimizer that steps by its entry 'lr'."
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
        if self.family.momentum in ("mean", "lion") and self.decays not in ("clock", 1):
            raise UnsupportedError(
                f"{name} normalises after its momentum, so its learning rate and its momentum follow the batch "
                f"together or not at all: use decays='clock' or 'constant', got {self.decays!r}."
            )
        if any(map(_centered, self.optimizer.param_groups)):
            raise UnsupportedError(
                f"The decays of {name}(centered=True) cannot be on the clock: a short average of squares less the "
                "square of a short average is far too small, and below 0 by rounding. Use decays='constant' or 'auto', "
                "or centered=False."
            )

    def exponent(self, iterations: float, group: int = 0) -> float:
        """Power of `iterations` that multiplies the learning rate of the group of that number."""
        if self.family.momentum not in ("mean", "lion") or self._power(iterations) == 1:
            return self.family.exponent
        entries = self.optimizer.param_groups[group]
        if self.family.momentum == "lion":
            return interpolated_exponent(iterations, *map(float, entries["betas"]))
        return averaged_exponent(iterations, float(entries["momentum"]))

    @property
    def same_law(self) -> list[bool]:
        """For each group, whether its learning rate follows the batch as the first one's does."""
        entry = {"mean": "momentum", "lion": "betas"}.get(self.family.momentum)
        groups = self.optimizer.param_groups
        return [entry is None or group[entry] == groups[0][entry] for group in groups]

    @contextmanager
    def scaled(self, *, lr_factor: float | Sequence[float], iterations: float, scale: float = 1.0) -> Iterator[None]:
        """Hold the values of a step of `iterations` base iterations at `scale`, then put the base values back, but for
        what somebody else has written in between.

        The learning rate is multiplied by `lr_factor`, one for all groups or one for each. With decays on the clock and
        k = `iterations`, or `iterations ** decays`:

            betas, alpha -> beta ** k, alpha ** k
            momentum     -> as `momentum_at` says, with the gradient's weight that keeps lr / (1 - momentum)
            lr_decay     -> times k, and NAdam's momentum_decay: what multiplies the step count
            weight decay -> times k / lr_factor, where it is decoupled, so that lr * weight_decay moves by k
            step count   -> in units of k, so that a debiasing by 1 - beta ** step is exact while k changes
            Adagrad sum  -> of base iterations, k ** 2 times that of steps

        A buffer of momentum is the same running sum of base iterations whatever k is. A learning rate held in a tensor
        is changed in place, and keeps its identity. A step count that is an int becomes a float.

        Raises:
            InvalidValueError: so many iterations in one step leave RAdam no average to divide by.
            UnsupportedError: the step has changed a number that is not on the clock, of a class that is said to be like
                another one, or it needs a step count that is whole.
        """
        k = self._power(iterations)
        groups = list(self.optimizer.param_groups)
        if (local := local_of(self.optimizer)) is not self.optimizer:
            groups += local.param_groups  # a closure runs after these were synchronised with the outer ones
        factors = list(lr_factor) if isinstance(lr_factor, Sequence) else [lr_factor] * len(groups)
        factors *= len(groups) // len(factors)  # those that were synchronised are in the same order
        momenta = [self._momentum(group, iterations, scale) for group in groups]
        changes = [self._values(g, f, k, m) for g, f, m in zip(groups, factors, momenta, strict=True)]
        if not any(changes):
            yield  # nothing changes, bit for bit
            return
        laws = [(f, m, group.get("momentum")) for group, f, m in zip(groups, factors, momenta, strict=True)]
        shared = _separated(groups, laws)
        # All are read before any is written: groups may share one tensor.
        saved = [{name: _copy(group[name]) for name in values} for group, values in zip(groups, changes, strict=True)]
        own = momenta[-len(local.param_groups) :]  # those of the groups that hold the state
        for group, momentum in zip(local.param_groups, own, strict=True):
            self._prepare_momentum(group, momentum)
        for entries, divisor in self._state_entries(k, own):
            torch._foreach_div_(entries, divisor)  # not times 1 / k: rounding that would be one-sided for a constant k
        self._count_numbers(lambda count, unit: _Count(count / unit), k)
        before = self._running_numbers() if self.family.stated and k != 1 else {}
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
            self._count_numbers(lambda count, unit: float(count) * unit, k)
            for group, own_lr, common in shared:
                if group["lr"] is own_lr:
                    group["lr"] = common
        self._check_running(before)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Put the groups' counts back after a step without gradients, which leaves those at the parameters alone."""
        groups = local_of(self.optimizer).param_groups
        saved = [(group, name, group.get(name)) for group in groups for name in self.family.state]
        yield
        for group, name, count in saved:
            if count is not None:
                group[name] = count
            else:
                group.pop(name, None)

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
        decoupled = family.decoupled or any(map(group.get, _DECOUPLED))
        # A fixed one (pytorch-optimizer's) is not multiplied by the learning rate.
        factor = 1.0 if group.get("fixed_decay") else lr_factor
        if self._on_clock and decoupled and group.get("weight_decay") and factor and k != factor:
            changed["weight_decay"] = group["weight_decay"] * (k / factor)
        if k == 1:
            return changed
        for name in family.names if not _centered(group) else ():
            value = group[name]
            if value is None:  # Adafactor without an average of its steps
                continue
            changed[name] = tuple(beta**k for beta in value) if isinstance(value, tuple | list) else value**k
        if family.momentum == "lion":
            share, memory = group["betas"]
            changed["betas"] = (share, memory**k)
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
            if parameter.grad is None:
                continue
            state = local_of(self.optimizer).state[parameter]
            if state.get("momentum_buffer") is None:  # as sparse as the gradient that torch would copy
                like = parameter.grad if parameter.grad.is_sparse else parameter
                state["momentum_buffer"] = torch.zeros_like(like)

    def _state_entries(self, k: float, momenta: Sequence[float]) -> Iterator[tuple[list[Tensor], float]]:
        """State that is kept in another unit than this step's, with what divides it."""
        local = local_of(self.optimizer)
        for name, power in self.family.state.items() if k != 1 else ():
            holders = [holder for holder in _holders(local) if isinstance(holder.get(name), Tensor)]
            for holder in holders:
                if not holder[name].is_floating_point():
                    holder[name] = holder[name].float()
            entries = [holder[name] for holder in holders]
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

    def _count_numbers(self, changed: Callable[[float, float], float], k: float) -> None:
        """Change the counts of steps that are numbers, in the state or in a group, by what k is a unit of."""
        for name, power in self.family.state.items() if k != 1 else ():
            for holder in _holders(local_of(self.optimizer)):
                if _is_number(holder.get(name)):
                    holder[name] = changed(holder[name], k**power)

    def _running_numbers(self) -> dict[tuple[int, str], Any]:
        """The numbers that a step may change: in the groups, the state and the optimizer itself, by where they are."""
        local = local_of(self.optimizer)
        known = {*self.family.state, *self.family.names, *self.family.rates, "lr", "momentum", "weight_decay"}
        scalars = [state for p, state in local.state.items() if isinstance(p, Tensor) and not p.dim()]
        holders = [vars(local), *(holder for holder in _holders(local) if all(holder is not each for each in scalars))]
        return {
            (id(holder), name): _mark(value)
            for holder in holders
            for name, value in holder.items()
            if isinstance(name, str)
            and name not in known
            and (_is_number(value) or (isinstance(value, Tensor) and not value.dim()))
        }

    def _check_running(self, before: Mapping[tuple[int, str], Any]) -> None:
        """Raise where a step has changed a number of which the class that it is like has none."""
        after = self._running_numbers() if before else {}
        moved = sorted({name for (at, name), value in before.items() if after.get((at, name), value) != value})
        if moved:
            name = type(local_of(self.optimizer)).__name__
            raise UnsupportedError(
                f"{name} changes {', '.join(moved)} in its step, which the class that it is said to be like has not: a "
                "count or a sum over steps that is not on the clock, so that steps at another batch would be of "
                "another length. If it is the count of steps that debiases the averages, name it 'step'; otherwise "
                "use AdaScale(like=..., decays='constant')."
            )


# Entries of a group that say that its weight decay is decoupled: torch's and pytorch-optimizer's.
_DECOUPLED = ("decoupled_weight_decay", "weight_decouple")


class _Count(float):
    """A count of steps in units of this step, for the time of the step: whoever needs a whole one gets an error."""

    __slots__ = ()

    def __add__(self, other: Any) -> Any:
        total = float(self) + other
        return _Count(total) if isinstance(total, float) else total

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def _refuse(self, *_: Any) -> Any:
        raise UnsupportedError(
            "This optimizer needs a whole number of steps, for a period or an index. Its averages are on the clock, "
            f"where the count is {float(self):g}: use a rule with decays='constant'."
        )

    __mod__ = __floordiv__ = __divmod__ = __int__ = __trunc__ = __floor__ = __ceil__ = __round__ = _refuse


def _separated(groups: Sequence[dict[str, Any]], laws: Sequence[object]) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
    """Give groups that share a tensor learning rate, but not the law that it follows, a copy each.

    Returns:
        Each such group with its own tensor and the common one.
    """
    first: dict[int, object] = {}
    separated = []
    for group, law in zip(groups, laws, strict=True):
        common = group["lr"]
        if isinstance(common, Tensor) and first.setdefault(id(common), law) != law:
            group["lr"] = common.clone()
            separated.append((group, group["lr"], common))
    return separated


def _holders(local: Optimizer) -> list[dict[str, Any]]:
    """Where a count of steps may be: at each parameter, as torch has it, once in a group, or once in the state."""
    states: dict[Any, Any] = local.state
    return [states, *(state for state in states.values() if isinstance(state, dict)), *local.param_groups]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _centered(group: Mapping[str, Any]) -> bool:
    """Whether it divides by a variance: RMSprop's average of squares less the square of an average.

    With `alpha ** k` an average of few gradients, that difference is `2 a / (1 + a)` of the variance, a = `alpha ** k`.
    """
    return bool(group.get("centered"))


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
