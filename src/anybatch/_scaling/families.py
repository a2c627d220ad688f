"""The table of optimizer classes: how the learning rate of each follows the batch, and which of its values are decays.

To add a class, add a row.
"""

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch.optim import Optimizer

from anybatch._errors import AnybatchWarning, InvalidValueError, UnsupportedError

# Optimizers that have a controller, which scales them at every step.
attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


@dataclass(frozen=True)
class Family:
    """The row of an optimizer class."""

    exponent: float  # power of the gain that multiplies the learning rate
    decays: Literal["clock", "constant"]  # of the class's averages, by default
    names: tuple[str, ...] = ()  # group entries that are decays of averages, numbers or tuples: ** iterations
    # Entry `momentum`: of a sum of scaled gradients, of a mean that is normalised afterwards, or absent. "lion": entry
    # `betas` has the weight and the memory of a mean that is normalised afterwards (`_scaling/momentum.py`).
    momentum: Literal["sum", "mean", "lion", ""] = ""
    noise_factor: float = 1.0  # the measured default of `AdaScale(noise_factor=...)`
    rates: tuple[str, ...] = ()  # group entries that multiply the step count: times the iterations
    state: Mapping[str, int] = field(default_factory=dict)  # entries that count base iterations, with their powers
    decoupled: bool = False  # the weight decay is decoupled, and no entry of the group states it
    eps: float = 0.0  # power of the batch by which the quantity that eps is added to falls
    source: str = ""  # the paper of the exponent; empty where it is derived here
    # State entry whose root, debiased by 1 - beta2 ** step, divides each coordinate of a gradient; empty if none.
    second_moment: str = ""
    least: float = 0.0  # beta2 on the clock must stay above it
    off_clock: str = ""  # why the decays cannot be on the clock; empty where they can
    warning: str = ""  # of `attach`
    stated: bool = False  # a user named this row by `like=`


_SDE = "Malladi et al. 2022"
_SQUARES = "exp_avg_sq"
_ADAM = Family(
    0.5, "clock", ("betas",), noise_factor=2.0, state={"step": 1}, eps=0.5, source=_SDE, second_moment=_SQUARES
)
_ADAFACTOR = Family(0.5, "clock", state={"step": 1}, decoupled=True)
# Its steps are orthogonalised, so their length does not depend on the gradient's, as with a sign: 1/2 without momentum,
# more with it (`momentum.averaged_exponent`). lr multiplies its weight decay.
_MUON = Family(0.5, "clock", momentum="mean", decoupled=True)
# A step along the signs of beta1 * m + (1 - beta1) * g, then m = beta2 * m + (1 - beta2) * g. So beta2 is a memory.
# Over r base iterations the mean share of m stays near beta1, which is constant (`momentum.interpolated_exponent`).
_LION = Family(0.5, "clock", momentum="lion", decoupled=True)
_WHOLE = replace(_ADAM, decays="constant", off_clock="its kernels take a whole number of steps for the debiasing")
_WHOLE_W = replace(_WHOLE, decoupled=True)
# Each column of its basis is an Adam. Its first step only fills the averages.
_SOAP = Family(
    0.5, "constant", eps=0.5, off_clock="it renews its basis by the count of steps that debiases its averages"
)
_ADAM_LIKE = replace(_ADAM, noise_factor=1.0, second_moment="", source="")
_BELIEF = Family(
    0.5, "constant", eps=0.5, off_clock="it divides by distances from an average, which are too small if it is short"
)

_FREE = (
    "its beta1 interpolates between two sequences of weights, so it is not a memory, and its average weighs each step "
    "by the square of the learning rate. Train with torch.optim.AdamW or SGD, and average the weights on the clock "
    "with anybatch.ModelEMA"
)
_OWN_RATE = (
    "it estimates its learning rate from the distance that its steps have covered, so a scaled one changes the "
    "estimate. Train with torch.optim.AdamW and the learning rate that was found at the base batch"
)
_TWO_KINDS = (
    "its groups follow two laws, Muon's and AdamW's. Use torch.optim.Muon for the matrices and torch.optim.AdamW for "
    "the rest, and attach both: anybatch.attach([muon, adamw], ...)"
)
_SOPHIA = (
    "it clips its steps by an estimate of the curvature that has its own batch and period. Train with "
    "torch.optim.AdamW or Lion"
)
_LOOKAHEAD = (
    "it averages the weights once in k steps, whatever the batch. Attach to the inner optimizer, use that one alone, "
    "and average the weights on the clock with anybatch.ModelEMA"
)

# Every class of torch.optim and some of other packages: its row, or why it is refused and what to do. A name is that of
# the top package, as modules move between versions, and of the class. A derived class has the row of its base. With the
# exponent, constant gradients under noise go equally far per base iteration at any batch (tests/test_optimizers.py).
# It is 1 where the step is proportional to the gradient. It is 1/2 where the step is divided by the gradient's running
# size, which the noise dominates (Malladi et al. 2022). Decays on the clock: docs/architecture.md.
_TABLE: dict[str, Family | str] = {
    "torch.SGD": Family(1.0, "constant", momentum="sum", source="Goyal et al. 2017"),
    "torch.Adam": _ADAM,
    "torch.AdamW": _ADAM,
    # momentum_decay multiplies the step count; the running product of its factors is forgotten within a few steps.
    "torch.NAdam": Family(
        0.5, "clock", ("betas",), rates=("momentum_decay",), state={"step": 1}, eps=0.5, second_moment=_SQUARES
    ),
    # Its average has the length 2 / (1 - beta2) - 1; it never divides by one of 5 or less.
    "torch.RAdam": Family(0.5, "clock", ("betas",), state={"step": 1}, eps=0.5, least=2 / 3, second_moment=_SQUARES),
    "torch.RMSprop": Family(0.5, "clock", ("alpha",), momentum="sum", eps=0.5, source=_SDE),
    # The maximum of n noisy gradients grows with n. Only with n counted in steps does it fall as a gradient's size.
    "torch.Adamax": Family(
        0.5, "constant", eps=0.5, off_clock="it divides by a maximum, which grows with the number of gradients"
    ),
    "torch.Adadelta": Family(0.5, "constant", off_clock="it averages its own updates, whose size depends on rho"),
    "torch.SparseAdam": Family(
        0.5, "constant", eps=0.5, off_clock="a row's averages move when the row is used, not with the clock"
    ),
    # In 1/r of the steps the sum grows to 1/r, so the step is r times as long without scaling. In units of base
    # iterations the sum is r^2 times as large, which keeps it right while r changes.
    "torch.Adagrad": Family(0.0, "clock", rates=("lr_decay",), state={"step": 1, "sum": 2}, eps=1.0),
    "torch.Muon": _MUON,
    # min(lr, 1/sqrt(step)): with the count on the clock the second one, too, is multiplied by sqrt(r).
    "torch.Adafactor": replace(
        _ADAFACTOR,
        warning="Adafactor steps by the smaller of lr and 1 / sqrt(step), so a higher lr may be cut. With its step "
        "count on the clock that bound grows by the square root of the iterations only: use AdaScale() or SquareRoot() "
        "with decays='clock', or train with AdamW.",
    ),
    "torch.Rprop": "its steps do not depend on the learning rate after the first",
    "torch.ASGD": "it applies a learning rate one step late",
    "torch.LBFGS": "it takes differences of gradients for curvature, and its step length from a line search",
    "transformers.Adafactor": replace(_ADAFACTOR, names=("beta1",)),
    **dict.fromkeys(("muon.Muon", "muon.SingleDeviceMuon"), _MUON),
    **dict.fromkeys(("muon.MuonWithAuxAdam", "muon.SingleDeviceMuonWithAuxAdam"), _TWO_KINDS),
    **{f"pytorch_optimizer.{name}Muon": _TWO_KINDS for name in ("", "Distributed", "Ada", "Nor")},
    "pytorch_optimizer.AdaGO": _TWO_KINDS,
    **dict.fromkeys(("lion_pytorch.Lion", "pytorch_optimizer.Lion"), _LION),
    **{
        f"bitsandbytes.{paged}{name}{bits}": row
        for paged in ("", "Paged")
        for name, row in (("Lion", _LION), ("Adam", _WHOLE), ("AdamW", _WHOLE_W))
        for bits in ("", "8bit", "32bit")
    },
    **dict.fromkeys(("pytorch_optimizer.AdamP", "pytorch_optimizer.StableAdamW"), _ADAM_LIKE),
    "pytorch_optimizer.AdaBelief": _BELIEF,
    **dict.fromkeys(("soap.SOAP", "pytorch_optimizer.SOAP"), _SOAP),
    **dict.fromkeys(("sophia.SophiaG", "pytorch_optimizer.SophiaH"), _SOPHIA),
    **{
        f"schedulefree.{name}ScheduleFree{kind}": _FREE
        for name in ("AdamW", "RAdam", "SGD")
        for kind in ("", "Closure", "Paper", "Reference")
    },
    **dict.fromkeys(("schedulefree.ScheduleFreeWrapper", "schedulefree.ScheduleFreeWrapperReference"), _FREE),
    **{f"pytorch_optimizer.ScheduleFree{name}": _FREE for name in ("AdamW", "RAdam", "SGD")},
    **dict.fromkeys(("prodigyopt.Prodigy", "pytorch_optimizer.Prodigy"), _OWN_RATE),
    **{
        f"{package}.DAdapt{name}": _OWN_RATE
        for package in ("dadaptation", "pytorch_optimizer")
        for name in ("AdaGrad", "Adam", "AdamPreprint", "Adan", "Lion", "SGD")
    },
    **dict.fromkeys(("pytorch_optimizer.Lookahead", "torch_optimizer.Lookahead", "timm.Lookahead"), _LOOKAHEAD),
}
# The values of `like=`: the rows that were measured by training (docs/same-training.md).
_LIKE = ("SGD", "Adam", "AdamW", "Muon")


def row_of(optimizer: Optimizer) -> Family:
    """The row of the optimizer's class or base class in torch.optim.

    Raises:
        UnsupportedError: scaling has no meaning for this class, or it is unknown.
    """
    name, row = _entry(optimizer)
    if row is None or not name.startswith("torch."):
        raise UnsupportedError(
            f"How the hyperparameters of {type(optimizer).__name__} follow the batch is not known: it is not derived "
            "from a class of torch.optim. Set its values yourself, or use attach with a rule that states an exponent."
        )
    return row


def family_of(optimizer: Optimizer, *, exponent: float | None, like: type[Optimizer] | None = None) -> Family:
    """The table's row for `optimizer`, that of the class `like`, or a row for a stated `exponent`.

    `like` is used where there is no row, and for a class that is derived from one of torch.optim.

    Raises:
        InvalidValueError: `like` is not one of its values, or has entries that this optimizer's groups lack.
        UnsupportedError: scaling has no meaning for this class, or it is unknown and nothing is stated.
    """
    name, row = _entry(optimizer)
    package, _, cls = name.partition(".")
    derived = package == "torch" and type(local_of(optimizer)) is not getattr(torch.optim, cls, None)
    if like is not None and (row is None or derived):  # a derived class may step otherwise than its base
        return _family_like(optimizer, like)
    if row is not None:
        if row.warning:
            warnings.warn(row.warning, AnybatchWarning, stacklevel=5)
        return row
    if exponent is not None:
        return Family(exponent, "constant", off_clock="which of its entries are decays is not known")
    raise UnsupportedError(
        f"How the learning rate of {type(local_of(optimizer)).__name__} follows the batch is not known (known: "
        f"{known_classes()}). Name one that it is like: rule=anybatch.AdaScale(like=torch.optim.AdamW) if it divides "
        "the gradient by its running size, Muon if it normalises after its momentum, SGD if it does neither. Or state "
        "exponent=1 or 0.5, and the decays stay constant."
    )


def _entry(optimizer: Optimizer) -> tuple[str, Family | None]:
    """The name and the row in the table; an empty name and `None` where the class is unknown.

    Raises:
        UnsupportedError: scaling has no meaning for this optimizer.
    """
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise UnsupportedError("ZeroRedundancyOptimizer(overlap_with_ddp=True) never calls step(): use False.")
    local = local_of(optimizer)
    own = type(local).__name__
    if hasattr(local, "first_step") and hasattr(local, "second_step"):
        raise UnsupportedError(
            f"{own} steps in two halves, first_step() and second_step(), with a backward between them, as SAM does: "
            "attach to the inner optimizer, anybatch.attach(optimizer.base_optimizer, ...), which steps once, and call "
            "first_step(zero_grad=True)."
        )
    if any(group.get("relative_step") for group in local.param_groups):
        raise UnsupportedError(
            f"{own}(relative_step=True) computes its own learning rate, so that scaling 'lr' changes nothing: set "
            "lr and relative_step=False (and warmup_init=False), or train with torch.optim.AdamW."
        )
    for cls in type(local).__mro__:
        name = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
        row = _TABLE.get(name)
        if isinstance(row, str):
            raise UnsupportedError(f"{own} cannot be scaled: {row}.")
        if row is not None:
            return name, row
    return "", None


def _family_like(optimizer: Optimizer, like: type[Optimizer]) -> Family:
    row = next((_TABLE[f"torch.{name}"] for name in _LIKE if like is getattr(torch.optim, name, None)), None)
    if not isinstance(row, Family):
        raise InvalidValueError(f"like must be one of torch.optim's {', '.join(_LIKE)}; got {like!r}.")
    own = type(local_of(optimizer)).__name__
    needed = {*row.names, *row.rates, *(("momentum",) if row.momentum else ())}
    lacking = [needed - group.keys() for group in optimizer.param_groups]
    if any(lacking):
        entries = ", ".join(sorted(set().union(*lacking)))
        if not all(lacking):
            raise InvalidValueError(
                f"For {own}, like={like.__name__} is given, and only some of its groups have {entries}: groups of two "
                "kinds follow two laws. Make two optimizers, one of them of a class in torch.optim, and attach both: "
                "anybatch.attach([first, second], rule=anybatch.AdaScale(like=...)). Then like is used for the other."
            )
        raise InvalidValueError(
            f"For {own}, like={like.__name__} is given, but its groups have no {entries}: give the entries these "
            "names, or state an exponent."
        )
    # AdamW of torch states in its groups that the decay is decoupled; other classes do not. The entry of the second
    # moment is not known. Most classes of pytorch-optimizer count their steps, whether they use the count or not.
    decoupled = row.decoupled or issubclass(like, torch.optim.AdamW)
    return replace(row, decoupled=decoupled, second_moment="", state={"step": 1} | dict(row.state), stated=True)


def known_classes() -> str:
    """The classes of torch.optim that can be scaled, by name."""
    rows = ((name.partition("."), row) for name, row in _TABLE.items())
    return ", ".join(sorted(cls for (package, _, cls), row in rows if package == "torch" and isinstance(row, Family)))


def second_moment_of(optimizer: Optimizer, family: Family) -> str:
    """The state entry that holds the weights of Adam's metric.

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
        weighing = (name for name, row in _TABLE.items() if isinstance(row, Family) and row.second_moment)
        known = ", ".join(sorted(name.removeprefix("torch.") for name in weighing))
        raise UnsupportedError(
            f"AdaScale(metric='adam') weighs gradients by Adam's second moments, and {type(local).__name__} has none: "
            f"use metric='euclidean', or one of {known}."
        )
    return family.second_moment


def local_of(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds the state: itself, or the one of this rank's shard in a ZeroRedundancyOptimizer."""
    # By name: importing torch.distributed.optim warns of torch.jit, and not every build of torch has it.
    sharded = any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__)
    return optimizer.optim if sharded else optimizer  # type: ignore[attr-defined]
