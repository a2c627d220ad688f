"""What the theory says of each class of torch.optim: how its learning rate follows the batch, and which of its numbers
are memories counted in steps. One table; to add a class is to add a row.
"""

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch.optim import Optimizer

from anybatch._errors import AnybatchWarning, InvalidValueError, UnsupportedError

# Optimizers that have a controller: it scales them at every step, so nobody else may.
attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


@dataclass(frozen=True)
class Family:
    """What the theory says of an optimizer class.

    Args:
        exponent: power of the gain that multiplies the learning rate.
        decays: whether the class's averages are on the clock by default.
        names: group entries that are decays of averages, numbers or tuples of numbers: to the power of the iterations.
        momentum: what the entry `momentum` is: of a sum of what is scaled already, of a mean that is normalised
            after, or not there; `_scaling/momentum.py` has the two kinds.
        noise_factor: the measured default of `AdaScale(noise_factor=...)`.
        rates: group entries that multiply the step count: times the iterations.
        state: state entries that count base iterations, each with its power of them.
        decoupled: whether the weight decay is decoupled although the group has no entry that says so.
        eps: power of the batch by which the size of what eps is added to falls.
        source: the paper of the exponent; empty where it was worked out here.
        second_moment: the state entry whose root a gradient is divided by, coordinate by coordinate, debiased by
            1 - beta2 ** step; empty where there is none. `AdaScale(metric="adam")` weighs by it.
        least: beta2 on the clock must stay above it.
        off_clock: why the decays cannot be on the clock; empty where they can.
        warning: what a user should know at `attach`.
    """

    exponent: float
    decays: Literal["clock", "constant"]
    names: tuple[str, ...] = ()
    momentum: Literal["sum", "mean", ""] = ""
    noise_factor: float = 1.0
    rates: tuple[str, ...] = ()
    state: Mapping[str, int] = field(default_factory=dict)
    decoupled: bool = False
    eps: float = 0.0
    source: str = ""
    second_moment: str = ""
    least: float = 0.0
    off_clock: str = ""
    warning: str = ""


_SDE = "Malladi et al. 2022"
_SQUARES = "exp_avg_sq"
_ADAM = Family(
    0.5, "clock", ("betas",), noise_factor=2.0, state={"step": 1}, eps=0.5, source=_SDE, second_moment=_SQUARES
)

# Every class of torch.optim: its row, or why it is refused. The exponent is what makes constant gradients under noise
# go equally far per base iteration at any batch (tests/test_optimizers.py): 1 where the step is proportional to the
# gradient; 1/2 where it is divided by its own running size, which the noise dominates (Malladi et al. 2022). Decays on
# the clock: docs/architecture.md.
_TABLE: dict[str, Family | str] = {
    "SGD": Family(1.0, "constant", momentum="sum", source="Goyal et al. 2017"),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    # momentum_decay multiplies the step count; the running product of its factors is forgotten within a few steps.
    "NAdam": Family(
        0.5, "clock", ("betas",), rates=("momentum_decay",), state={"step": 1}, eps=0.5, second_moment=_SQUARES
    ),
    # Its average has the length 2 / (1 - beta2) - 1; it never divides by one of 5 or less.
    "RAdam": Family(0.5, "clock", ("betas",), state={"step": 1}, eps=0.5, least=2 / 3, second_moment=_SQUARES),
    "RMSprop": Family(0.5, "clock", ("alpha",), momentum="sum", eps=0.5, source=_SDE),
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
    # Orthogonalised, so its length says nothing of the gradient's, as with a sign: 1/2 without momentum, more with it,
    # as it is normalised after (`momentum.averaged_exponent`). lr multiplies its weight decay.
    "Muon": Family(0.5, "clock", momentum="mean", decoupled=True),
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


def family_of(optimizer: Optimizer, *, exponent: float | None, like: type[Optimizer] | None = None) -> Family:
    """The table's row for `optimizer`, that of the class it is `like`, or a row for a stated `exponent`.

    Raises:
        InvalidValueError: `like` is no class of the table, or has entries that this optimizer's groups have not.
        UnsupportedError: scaling has no meaning for this class, or it is unknown and nothing is stated.
    """
    if like is not None:
        return _family_like(optimizer, like)
    row = row_of(optimizer)
    if row is not None:
        if row.warning:
            warnings.warn(row.warning, AnybatchWarning, stacklevel=4)
        return row
    if exponent is not None:
        return Family(exponent, "constant", off_clock="which of its entries are decays is not known")
    raise UnsupportedError(
        f"How the learning rate of {type(local_of(optimizer)).__name__} follows the batch is not known (known: "
        f"{known_classes()}). Say which of these it is like: rule=anybatch.AdaScale(like=torch.optim.AdamW) if the "
        "gradient is divided by its own running size, Muon if it normalises after its momentum, SGD if it does "
        "neither; or "
        "exponent=1 or 0.5, with decays that stay as they are."
    )


def _family_like(optimizer: Optimizer, like: type[Optimizer]) -> Family:
    row = _CLASSES.get(like)
    if not isinstance(row, Family):
        raise InvalidValueError(f"like must be one of torch.optim's {known_classes()}; got {like!r}.")
    needed = {*row.names, *row.rates, *(("momentum",) if row.momentum else ())}
    lacking = sorted({name for group in optimizer.param_groups for name in needed - group.keys()})
    if lacking:
        raise InvalidValueError(
            f"{type(local_of(optimizer)).__name__} is said to be like {like.__name__}, but its groups have no "
            f"{', '.join(lacking)}: name the entries so, or state an exponent."
        )
    # Of torch's own a group says so; nobody else's does.
    return replace(row, decoupled=row.decoupled or issubclass(like, torch.optim.AdamW))


def known_classes() -> str:
    """The classes of torch.optim that can be scaled, by name."""
    return ", ".join(sorted(cls.__name__ for cls, row in _CLASSES.items() if isinstance(row, Family)))


def second_moment_of(optimizer: Optimizer, family: Family) -> str:
    """The state entry by which Adam's metric weighs.

    Raises:
        UnsupportedError: the class has none, or keeps each parameter's on one rank.
    """
    local = local_of(optimizer)
    if local is not optimizer:
        raise UnsupportedError(
            "AdaScale(metric='adam') needs Adam's second moments of every parameter on every rank, and a "
            "ZeroRedundancyOptimizer keeps each on one: use metric='euclidean', or FSDP2."
        )
    if not family.second_moment:
        known = ", ".join(sorted(cls.__name__ for cls, row in _CLASSES.items() if _weighs(row)))
        raise UnsupportedError(
            f"AdaScale(metric='adam') weighs gradients by Adam's second moments, and {type(local).__name__} keeps no "
            f"such ones: use metric='euclidean', or one of {known}."
        )
    return family.second_moment


def _weighs(row: Family | str) -> bool:
    return isinstance(row, Family) and bool(row.second_moment)


def local_of(optimizer: Optimizer) -> Optimizer:
    """What holds the state: the optimizer itself, or the one that a ZeroRedundancyOptimizer runs on this rank's shard.

    By name: importing torch.distributed.optim warns of torch.jit, and not every build of torch has it.
    """
    sharded = any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__)
    return optimizer.optim if sharded else optimizer  # type: ignore[attr-defined]
