"""The values of one optimizer step from its `Scaling`: learning rate, decays, weight decay, step counts.

All are changed for one `step()` and restored. `families` has what depends on the class, `momentum` the momentum.
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
from anybatch._scaling.momentum import Decays, automatic, averaged_exponent, clock_power, interpolated_exponent


@dataclass(frozen=True)
class Hyperparameters:
    """The values of an optimizer in a step of `iterations` base iterations.

    Raises:
        InvalidValueError: a momentum of 1 or more, unless decays are constant.
        UnsupportedError: decays on the clock where they cannot be right; a group without a learning rate, or with one
            that is not a number.
    """

    optimizer: Optimizer  # of the user
    family: Family
    decays: Decays  # as in `Rule`
    total: float | None  # base iterations of the run; `None`: automatic momenta are constant

    def __post_init__(self) -> None:
        name, groups = type(local_of(self.optimizer)).__name__, self.optimizer.param_groups
        for group in groups:
            if "lr" not in group:
                raise UnsupportedError(
                    f"{name} has a parameter group without a learning rate, its entry 'lr', so there is nothing to "
                    "scale."
                )
            if isinstance(group["lr"], bool) or not isinstance(group["lr"], Real | Tensor):
                raise UnsupportedError(
                    f"{name} has the learning rate lr={group['lr']!r}, so there is nothing to scale: give it a number, "
                    "or use an optimizer that steps by its entry 'lr'."
                )
        endless = [group["momentum"] for group in groups if self.family.momentum and group.get("momentum", 0) >= 1]
        if endless and self.decays not in ("constant", 0):
            raise InvalidValueError(
                f"A momentum of {endless[0]:g} never forgets, so it has no length in base iterations: use one below 1, "
                "or decays='constant'."
            )
        if self.decays in ("auto", "constant", 0):
            return
        if self.family.off_clock:
            raise UnsupportedError(
                f"The decays of {name} cannot be on the clock: {self.family.off_clock}. Use decays='constant'."
            )
        if self.family.momentum in ("mean", "lion") and self.decays not in ("clock", 1):
            raise UnsupportedError(
                f"{name} normalises after its momentum, so its learning rate and its momentum follow the batch "
                f"together or not at all: use decays='clock' or 'constant', got {self.decays!r}."
            )
        if any(map(_centered, groups)):
            raise UnsupportedError(
                f"The decays of {name}(centered=True) cannot be on the clock: a short average of squares less the "
                "square of a short average is far too small, and below 0 by rounding. Use decays='constant' or 'auto', "
                "or centered=False."
            )

    def exponent(self, iterations: float, group: int = 0) -> float:
        """The power of `iterations` that multiplies the learning rate of the group with this number."""
        if self.family.momentum not in ("mean", "lion") or self._power(iterations) == 1:
            return self.family.exponent
        entries = self.optimizer.param_groups[group]
        if self.family.momentum == "lion":
            return interpolated_exponent(iterations, *map(float, entries["betas"]))
        return averaged_exponent(iterations, float(entries["momentum"]))

    @property
    def same_law(self) -> list[bool]:
        """For each group, whether its learning rate follows the batch as the first group's does."""
        entry = {"mean": "momentum", "lion": "betas"}.get(self.family.momentum)
        groups = self.optimizer.param_groups
        return [entry is None or group[entry] == groups[0][entry] for group in groups]

    @contextmanager
    def scaled(self, *, lr_factor: float | Sequence[float], iterations: float, scale: float = 1.0) -> Iterator[None]:
        """Set the values of a step of `iterations` base iterations at `scale`, then restore the base values.

        A value that was written in between is kept. The learning rate is multiplied by `lr_factor`, one for all groups
        or one for each. With decays on the clock, k is `iterations` or `iterations ** decays`, and:

            `betas`, `alpha`    become `beta ** k`, `alpha ** k`.
            `momentum`          becomes its power too, and the gradient's weight keeps lr / (1 - momentum).
            `lr_decay`          is multiplied by k, like NAdam's `momentum_decay`: both multiply the step count.
            Weight decay        is multiplied by k / lr_factor where it is decoupled: lr * weight_decay changes by k.
            Step counts         are in units of k, so that a debiasing by 1 - beta ** step is exact while k changes.
            Adagrad's sum       is that of base iterations, k ** 2 times that of steps.

        A buffer of momentum is the same running sum of base iterations whatever k is. A learning rate held in a tensor
        is changed in place, and keeps its identity. A step count that is an int becomes a float.

        Raises:
            InvalidValueError: so many iterations in one step leave RAdam no average to divide by.
            UnsupportedError: under `like=`, the step has changed a number that is not on the clock; or the step needs a
                whole step count.
        """
        k = self._power(iterations)
        groups = list(self.optimizer.param_groups)
        if (local := local_of(self.optimizer)) is not self.optimizer:
            groups += local.param_groups  # in the same order; a closure runs after their synchronisation
        factors = list(lr_factor) if isinstance(lr_factor, Sequence) else [lr_factor] * len(groups)
        factors *= len(groups) // len(factors)
        momenta = [self._momentum(group, iterations, scale) for group in groups]
        changes = [self._values(g, f, k, m) for g, f, m in zip(groups, factors, momenta, strict=True)]
        if not any(changes):
            yield  # nothing changes, bit for bit
            return
        laws = [(f, m, group.get("momentum")) for group, f, m in zip(groups, factors, momenta, strict=True)]
        shared = _separated(groups, laws)
        # All are read before any is written: groups may share one tensor.
        saved = [{name: _copy(group[name]) for name in values} for group, values in zip(groups, changes, strict=True)]
        own = momenta[-len(local.param_groups) :]  # of the groups that hold the state
        for group, momentum in zip(local.param_groups, own, strict=True):
            self._prepare_momentum(group, momentum)
        for entries, divisor in self._state_entries(k, own):
            # Not times 1 / k: for a constant k its rounding is one-sided.
            torch._foreach_div_(entries, _operand(divisor, entries))
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
            # After a step that raised, this runs late: values that the user has set since then are kept.
            kept = {(id(group), name) for group, name, mark in written if _mark(group[name]) != mark}
            for group, values in zip(groups, saved, strict=True):
                _assign(group, {n: value for n, value in values.items() if (id(group), n) not in kept})
            for entries, divisor in self._state_entries(k, own):
                torch._foreach_mul_(entries, _operand(divisor, entries))
            self._count_numbers(lambda count, unit: float(count) * unit, k)
            for group, own_lr, common in shared:
                if group["lr"] is own_lr:
                    group["lr"] = common
        self._check_running(before)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Restore the groups' counts after a step without gradients, which changes none at the parameters."""
        groups = local_of(self.optimizer).param_groups
        saved = [(group, name, group.get(name)) for group in groups for name in self.family.state]
        yield
        for group, name, count in saved:
            if count is not None:
                group[name] = count
            else:
                group.pop(name, None)

    @property
    def _decays(self) -> Decays:
        """The decays of averages, step counts and a decoupled weight decay."""
        return self.family.decays if self.decays == "auto" else self.decays

    def _power(self, iterations: float) -> float:
        """The base iterations of the class's averages in this step: betas, alpha, step counts."""
        return clock_power(self._decays, iterations)

    def _momentum(self, group: dict[str, Any], iterations: float, scale: float) -> float:
        """The group's momentum in this step."""
        momentum: float = group.get("momentum", 0.0)
        if not momentum or not self.family.momentum:
            return momentum
        decays = self._decays
        if self.decays == "auto" and self.family.momentum != "mean":
            decays = automatic(momentum, scale=scale, total=self.total)
        return float(momentum ** clock_power(decays, iterations))

    def _values(self, group: dict[str, Any], lr_factor: float, k: float, momentum: float) -> dict[str, Any]:
        """The group's entries that change in this step."""
        family = self.family
        changed: dict[str, Any] = {}
        if lr_factor != 1:
            changed["lr"] = group["lr"] * lr_factor
        if momentum != group.get("momentum", 0.0):
            changed["momentum"] = momentum
            if family.momentum == "sum":
                weight = _gradient_weight(group, momentum)
                if _has_dampening(group):
                    changed["dampening"] = 1 - (1 - group["dampening"]) * weight
                else:
                    changed["lr"] = group["lr"] * (lr_factor * weight)
        decoupled = family.decoupled or any(map(group.get, _DECOUPLED))
        on_clock = self._decays not in ("constant", 0)
        # A fixed weight decay (pytorch-optimizer's) is not multiplied by the learning rate.
        factor = 1.0 if group.get("fixed_decay") else lr_factor
        if on_clock and decoupled and group.get("weight_decay") and factor and k != factor:
            changed["weight_decay"] = group["weight_decay"] * (k / factor)
        if k == 1:
            return changed
        for name in family.names if not _centered(group) else ():
            if (value := group[name]) is not None:  # Adafactor without an average of its steps
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
        """Create zero buffers for SGD, whose first step would take the gradient without the dampening."""
        if self.family.momentum != "sum" or momentum == group["momentum"] or not _has_dampening(group):
            return
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = local_of(self.optimizer).state[parameter]
            if state.get("momentum_buffer") is None:  # as sparse as the gradient that torch would copy
                like = parameter.grad if parameter.grad.is_sparse else parameter
                state["momentum_buffer"] = torch.zeros_like(like)

    def _state_entries(self, k: float, momenta: Sequence[float]) -> Iterator[tuple[list[Tensor], float]]:
        """The state that is kept in another unit than this step's, with its divisor."""
        local = local_of(self.optimizer)
        for name, power in self.family.state.items() if k != 1 else ():
            holders = [holder for holder in _holders(local) if isinstance(holder.get(name), Tensor)]
            for holder in holders:
                if not holder[name].is_floating_point():
                    holder[name] = holder[name].float()
            if holders:
                yield [holder[name] for holder in holders], k**power
        for group, momentum in zip(local.param_groups, momenta, strict=True) if self.family.momentum == "sum" else ():
            if not group["momentum"] or momentum == group["momentum"] or _has_dampening(group):
                continue
            buffers = [local.state[p].get("momentum_buffer") for p in group["params"] if p in local.state]
            if entries := [buffer for buffer in buffers if isinstance(buffer, Tensor)]:
                yield entries, _gradient_weight(group, momentum)

    def _count_numbers(self, changed: Callable[[float, float], float], k: float) -> None:
        """Change the step counts that are numbers, in the state or in a group, to or from the unit k."""
        for name, power in self.family.state.items() if k != 1 else ():
            for holder in _holders(local_of(self.optimizer)):
                if _is_number(holder.get(name)):
                    holder[name] = changed(holder[name], k**power)

    def _running_numbers(self) -> dict[tuple[int, str], Any]:
        """The numbers that a step may change, in the groups, the state and the optimizer itself, by their place."""
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
        """Raise where a step has changed a number that the class of `like=` does not have."""
        after = self._running_numbers() if before else {}
        changed = sorted({name for (at, name), value in before.items() if after.get((at, name), value) != value})
        if changed:
            raise UnsupportedError(
                f"{type(local_of(self.optimizer)).__name__} changes {', '.join(changed)} in its step, and the class of "
                "like= has no such entry. A count or a sum over steps that is not on the clock would change the length "
                "of steps at another batch. If it is the step count that debiases the averages, name it 'step'; "
                "otherwise use AdaScale(like=..., decays='constant')."
            )


# Entries of a group that state that its weight decay is decoupled: torch's and pytorch-optimizer's.
_DECOUPLED = ("decoupled_weight_decay", "weight_decouple")


class _Count(float):
    """A step count in units of the present step; an error where a whole number is needed."""

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
            f"and the count is {float(self):g}: use a rule with decays='constant'."
        )

    __mod__ = __floordiv__ = __divmod__ = __int__ = __trunc__ = __floor__ = __ceil__ = __round__ = _refuse


def _separated(groups: Sequence[dict[str, Any]], laws: Sequence[object]) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
    """Copy a tensor learning rate for each group that shares it and not its law.

    Returns:
        Each of these groups with its own tensor and the common one.
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
    """The places of a step count: at each parameter, as torch has it, once in a group, or once in the state."""
    states: dict[Any, Any] = local.state
    return [states, *(state for state in states.values() if isinstance(state, dict)), *local.param_groups]


def _operand(divisor: float, entries: Sequence[Tensor]) -> float | Tensor:
    """The divisor of counts on the host as a tensor of their type: as a number each operation would convert it."""
    counts = all(type(each) is Tensor and not each.dim() and each.device.type == "cpu" for each in entries)
    dtype = torch.promote_types(entries[0].dtype, torch.float32)
    return torch.tensor(divisor, dtype=dtype) if counts and dtype.is_floating_point else divisor


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _centered(group: Mapping[str, Any]) -> bool:
    """Whether the group divides by a variance: RMSprop's average of squares less the square of an average.

    With a = `alpha ** k` of few gradients, that difference is `2 a / (1 + a)` of the variance.
    """
    return bool(group.get("centered"))


def _gradient_weight(group: dict[str, Any], momentum: float) -> float:
    """The gradient's weight in a buffer of `momentum` that keeps the base's lr / (1 - momentum)."""
    return (1 - momentum) / (1 - float(group["momentum"]))


def _has_dampening(group: dict[str, Any]) -> bool:
    """Whether the gradient's weight can be a dampening: SGD's without Nesterov, which takes the gradient unweighted."""
    return "dampening" in group and not group["nesterov"]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _mark(value: Any) -> Any:
    """A mark of `value` that changes when it is written; of a tensor its version, as a read may synchronise."""
    return (id(value), value._version) if isinstance(value, Tensor) else value


def _assign(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(group[name], Tensor):
            group[name].copy_(value)
        else:
            group[name] = value
