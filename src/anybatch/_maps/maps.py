"""The hyperparameter maps: every value of an optimizer at kappa times the batch, with its reason.

[Note: decays] A decay is a memory counted in base iterations, and one step at kappa times the batch replaces kappa of
them. `"power"` keeps the memory exactly: `beta ** kappa`, and weights that shrink by `(1 - lr * weight_decay) ** kappa`
a step. `"sde"` is the first-order form of the papers: `1 - kappa * (1 - beta)`, and `lr * weight_decay` times kappa.
Both compose: the map of kappa2 after that of kappa1 is the map of kappa1 * kappa2.
"""

from dataclasses import dataclass
from inspect import signature
from math import expm1, isfinite, log, log1p
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._errors import InvalidValueError
from anybatch._scaling import Family, averaged_exponent, check_positive, known_classes, row_of

BetasRule = Literal["power", "sde"]
Value = float | tuple[float, ...]

_NAMES = ("lr", "momentum", "betas", "alpha", "rho", "momentum_decay", "lr_decay", "eps", "weight_decay")
_DERIVED = "derived"
_BETAS = {"power": "beta ** kappa: a memory in base iterations", "sde": "1 - kappa * (1 - beta)"}
_DECOUPLED = {
    "power": "1 - lr * weight_decay to the power of kappa",
    "sde": "lr * weight_decay moves by kappa",
}
_LR = {
    1.0: "linear: the step is proportional to the gradient",
    0.5: "square root: the step is divided by the noise",
    0.0: "unchanged: it divides by a sum over steps, which grows more slowly",
}
_AVERAGED = "the distance of kappa steps along averaged noise: linear, or less"


@dataclass(frozen=True)
class Change:
    """One hyperparameter at another batch size.

    Args:
        before: the value at the base batch; a tuple for `betas`.
        after: the value at kappa times the batch.
        why: the formula or the reason, in a few words.
        source: the paper; "derived" for a formula of this project.
    """

    before: Value
    after: Value
    why: str
    source: str


def scale_hyperparameters(
    optimizer: str,
    kappa: float,
    *,
    betas_rule: BetasRule = "power",
    ema_decay: float | None = None,
    batch_norm_momentum: float | None = None,
    **values: Any,
) -> dict[str, Change]:
    """Every hyperparameter at `kappa` times the batch, with the reason.

        SGD                     lr -> kappa * lr
        Adam, AdamW, RMSprop    lr -> sqrt(kappa) * lr      eps -> eps / sqrt(kappa)
            betas, alpha        beta -> beta ** kappa                         "sde": 1 - kappa * (1 - beta)
            weight decay        (1 - (1 - lr * wd) ** kappa) / (sqrt(kappa) * lr)    "sde": sqrt(kappa) * wd
        model EMA               decay -> decay ** kappa
        BatchNorm               momentum -> 1 - (1 - momentum) ** kappa

    SGD's momentum is unchanged, and so is a weight decay that is part of the gradient. Muon's learning rate follows its
    momentum (docs/hyperparameters.md). Under `attach` none of this is needed: a controller does it step by step.

    With a mean gain as `kappa` the values are AdaScale's at the mean gain of a run: constants for a trainer in which
    nothing can be measured. `forecast(record, [S]).scales[0].gain.value` is that gain (docs/planning.md).

    Args:
        optimizer: the name of a class of torch.optim, in any case: "sgd", "adam", "adamw", "rmsprop", ...
        kappa: new batch / old batch, or a mean gain; positive, may be fractional or below 1.
        betas_rule: `"power"`, exact and valid at every kappa, or `"sde"`, the papers' first-order form, for betas,
            alpha and the decoupled weight decay.
        ema_decay: the factor of the model's moving average per step, in [0, 1).
        batch_norm_momentum: PyTorch's momentum of running statistics, in (0, 1].
        values: the optimizer's own: `lr`, `betas`, `eps`, `weight_decay`, `momentum`, ...; torch's defaults otherwise.

    Returns:
        A `Change` for each value, by name: `before`, `after`, `why` and `source`. Values that are 0 are left out.

    Raises:
        InvalidValueError: a value out of range; with `"sde"`, a kappa so large that a beta leaves (0, 1): the message
            has the limit.
        UnsupportedError: the optimizer cannot be scaled.

    Example:
        >>> new = anybatch.scale_hyperparameters("adamw", 4, lr=3e-4, betas=(0.9, 0.999), ema_decay=0.9999)
        >>> new["lr"].after, new["betas"].after[0] == 0.9**4, new["ema_decay"].after == 0.9999**4
        (0.0006, True, True)
        >>> anybatch.scale_hyperparameters("adam", 16, betas_rule="sde")
        Traceback (most recent call last):
        anybatch._errors.InvalidValueError: beta 0.9 at 16 times the batch ... kappa must be below 10; or use ...

    Source:
        SGD: Goyal et al. 2017. Adam and RMSprop: Malladi et al. 2022, the square-root rules. The model's average:
        Busbridge et al., How to Scale Your EMA, NeurIPS 2023, Definition 1.2.

    Differs from the paper in:
        1. `"power"` in place of `1 - kappa * (1 - beta)`: equal to first order in `kappa * (1 - beta)`.
        2. The decoupled weight decay and BatchNorm's momentum are averages of the same kind, with the same map.
        3. The other classes of torch.optim have derived rows: docs/hyperparameters.md.
    """
    kappa = check_positive("kappa", kappa)
    changes = map_group(*_example(optimizer, values), kappa, betas_rule)
    if ema_decay is not None:
        _check(isinstance(ema_decay, Real) and 0 <= ema_decay < 1, "ema_decay must be in [0, 1)", ema_decay)
        changes["ema_decay"] = Change(ema_decay, ema_decay**kappa, "decay ** kappa", "Busbridge et al. 2023")
    if batch_norm_momentum is not None:
        m = batch_norm_momentum
        _check(isinstance(m, Real) and 0 < m <= 1, "batch_norm_momentum must be in (0, 1]", m)
        after = m if kappa == 1 or m == 1 else -expm1(kappa * log1p(-m))
        changes["batch_norm_momentum"] = Change(m, after, "1 - (1 - m) ** kappa", _DERIVED)
    return changes


def _example(name: str, values: dict[str, Any]) -> tuple[dict[str, Any], Family]:
    """A parameter group of the class of that name, with torch's own checks and defaults."""
    classes = {
        cls.__name__.lower(): cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    cls = classes.get(name.lower()) if isinstance(name, str) else None
    if cls is None:
        raise InvalidValueError(f"optimizer must be one of {known_classes().lower()}; got {name!r}.")
    if unknown := sorted(set(values) - set(signature(cls).parameters)):
        raise InvalidValueError(f"{cls.__name__} has no {', '.join(unknown)}.")
    try:
        if len(values.get("betas", (0, 0))) != 2:
            raise ValueError("betas are two numbers")
        optimizer = cls([torch.zeros(1, 1)], **values)  # Muon needs two dimensions
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"{cls.__name__}: {error}.") from None
    return optimizer.param_groups[0], row_of(optimizer)


def map_group(group: dict[str, Any], family: Family, kappa: float, betas_rule: BetasRule) -> dict[str, Change]:
    """The changes of one parameter group; `InvalidValueError` for a value out of range, before or after."""
    if betas_rule not in ("power", "sde"):
        raise InvalidValueError(f'betas_rule must be "power" or "sde", got {betas_rule!r}.')
    values: dict[str, Value] = {}
    for name in _NAMES:
        raw = group.get(name)
        if name == "betas" and raw is not None:
            values[name] = tuple(float(beta) for beta in raw)
        elif isinstance(raw, Real | Tensor):  # Adafactor's eps is a pair of floors, which no batch moves
            values[name] = float(raw)
    for name, value in values.items():
        _check(all(isfinite(v) for v in flat(value)), f"{name} must be finite", value)
    changes = {}
    for name, value in values.items():
        if value == 0:
            continue
        after, why, source = _map_value(name, value, group, family, kappa, betas_rule)
        _check(all(isfinite(v) for v in flat(after)), f"{name} at {kappa:g} times the batch must be finite", after)
        changes[name] = Change(value, value if kappa == 1 else after, why, source)
    return changes


def lr_exponent(group: dict[str, Any], family: Family, kappa: float) -> float:
    """The power of `kappa` that multiplies the learning rate of `group`."""
    return averaged_exponent(kappa, float(group["momentum"])) if family.momentum == "mean" else family.exponent


def _map_value(
    name: str, value: Any, group: dict[str, Any], family: Family, kappa: float, betas_rule: BetasRule
) -> tuple[Value, str, str]:
    """The value at `kappa` times the batch, the reason and the source."""
    source = family.source or _DERIVED
    lr_factor = kappa ** lr_exponent(group, family, kappa)
    if name == "lr":
        return value * lr_factor, _AVERAGED if family.momentum == "mean" else _LR[family.exponent], source
    if name == "momentum" and family.momentum == "mean":
        return value**kappa, _BETAS["power"], _DERIVED
    if name == "eps" and family.eps:
        power = "sqrt(kappa)" if family.eps == 0.5 else "kappa"
        return value / kappa**family.eps, f"eps / {power}: as what it is added to", source
    if name in family.rates:
        return value * kappa, "times kappa: it multiplies the step count", _DERIVED
    if name == "weight_decay" and (family.decoupled or group.get("decoupled_weight_decay")):
        after = _decoupled(value, float(group["lr"]), lr_factor, kappa, betas_rule)
        return after, _DECOUPLED[betas_rule], _DERIVED
    if name in family.names and family.decays == "clock":
        betas = _decays(flat(value), kappa, betas_rule, least=family.least)
        return betas if name == "betas" else betas[0], _BETAS[betas_rule], source if betas_rule == "sde" else _DERIVED
    source = source if family.exponent == 1 else _DERIVED  # SGD: its paper keeps these
    if name == "weight_decay":
        return value, "unchanged: it is part of the gradient", source
    return value, f"unchanged: {family.off_clock}" if family.off_clock else "unchanged under this rule", source


def _decays(betas: tuple[float, ...], kappa: float, betas_rule: BetasRule, *, least: float) -> tuple[float, ...]:
    """Each beta at kappa times the batch; a beta of 0 has no memory, and stays 0."""
    if betas_rule == "power":
        after = tuple(float(beta**kappa) for beta in betas)
    else:
        shortest = min((beta for beta in betas if beta), default=1.0)
        if kappa * (1 - shortest) >= 1:
            raise InvalidValueError(
                f"beta {shortest:g} at {kappa:g} times the batch would be 1 - kappa * (1 - beta) = "
                f"{1 - kappa * (1 - shortest):.4g}: kappa must be below {1 / (1 - shortest):.6g}; or use the power "
                "rule, beta ** kappa."
            )
        after = tuple(beta and 1 - kappa * (1 - beta) for beta in betas)
    if least and after[1] <= least < betas[1]:
        largest = log(least) / log(betas[1]) if betas_rule == "power" else (1 - least) / (1 - betas[1])
        raise InvalidValueError(
            f"beta2 {betas[1]:g} at {kappa:g} times the batch would be {after[1]:.4g}, and RAdam needs more than "
            f"{least:.4g}: kappa must be below {largest:.6g}; or use AdamW."
        )
    return after


def _decoupled(decay: float, lr: float, lr_factor: float, kappa: float, betas_rule: BetasRule) -> float:
    """The decoupled weight decay at kappa times the batch."""
    shrink = lr * decay
    if kappa == 1:
        return decay
    if betas_rule == "sde" or lr == 0:
        if kappa * shrink >= 1:
            raise InvalidValueError(
                f"lr * weight_decay = {shrink:g} at {kappa:g} times the batch would be {kappa * shrink:.4g}, and from "
                f"1 on each step turns the weights' sign: kappa must be below {1 / shrink:.6g}; or use the power rule."
            )
        return decay * kappa / lr_factor
    _check(shrink < 1, "lr * weight_decay must be below 1: from 1 on each step turns the weights' sign", shrink)
    return -expm1(kappa * log1p(-shrink)) / (lr_factor * lr)


def flat(value: Value) -> tuple[float, ...]:
    """The numbers of a value."""
    return value if isinstance(value, tuple) else (value,)


def _check(right: bool, rule: str, value: object) -> None:
    if not right:
        raise InvalidValueError(f"{rule}, got {value!r}.")
