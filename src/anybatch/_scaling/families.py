"""What the theory says of each optimizer class: how its learning rate follows the batch, and which of its numbers are
memories counted in steps. One table; to add a class is to add a row.
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
            after, or not there. `"lion"`: the entry `betas` has the weight and the memory of a mean that is normalised
            after. `_scaling/momentum.py` has the kinds.
        noise_factor: the measured default of `AdaScale(noise_factor=...)`.
        rates: group entries that multiply the step count: times the iterations.
        state: entries of the state or the group that count base iterations, each with its power of them.
        decoupled: whether the weight decay is decoupled although the group has no entry that says so.
        eps: power of the batch by which the size of what eps is added to falls.
        source: the paper of the exponent; empty where it was worked out here.
        second_moment: the state entry whose root a gradient is divided by, coordinate by coordinate, debiased by
            1 - beta2 ** step; empty where there is none. `AdaScale(metric="adam")` weighs by it.
        least: beta2 on the clock must stay above it.
        off_clock: why the decays cannot be on the clock; empty where they can.
        warning: what a user should know at `attach`.
        stated: whether a user said by `like=` that a class follows this row.
    """

    exponent: float
    decays: Literal["clock", "constant"]
    names: tuple[str, ...] = ()
    momentum: Literal["sum", "mean", "lion", ""] = ""
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
    stated: bool = False


_SDE = "Malladi et al. 2022"
_SQUARES = "exp_avg_sq"
_ADAM = Family(
    0.5, "clock", ("betas",), noise_factor=2.0, state={"step": 1}, eps=0.5, source=_SDE, second_moment=_SQUARES
)

_ADAFACTOR = Family(0.5, "clock", state={"step": 1}, decoupled=True)
_MUON = Family(0.5, "clock", momentum="mean", decoupled=True)
# A step along the signs of beta1 * m + (1 - beta1) * g, then m = beta2 * m + (1 - beta2) * g. So beta2 is a memory.
# Over r base iterations the mean share of m stays near beta1, which is constant (`momentum.interpolated_exponent`).
_LION = Family(0.5, "clock", momentum="lion", decoupled=True)
_WHOLE = replace(_ADAM, decays="constant", off_clock="its kernels take a whole number of steps for the debiasing")
# Each column of its basis is an Adam. Its first step only fills the averages.
_SOAP = Family(
    0.5, "constant", eps=0.5, off_clock="it renews its basis by the count of steps that debiases its averages"
)
_ADAM_LIKE = replace(_ADAM, noise_factor=1.0, second_moment="", source="")
_BELIEF = Family(
    0.5, "constant", eps=0.5, off_clock="it divides by distances from an average, which are too small if it is short"
)

_FREE = (
    "its beta1 interpolates between two sequences of weights, so it is no memory, and its average weighs each step by "
    "the square of the learning rate. Train with torch.optim.AdamW or SGD, and average the weights on the clock with "
    "anybatch.ModelEMA"
)
_OWN_RATE = (
    "it estimates its learning rate from the distance that its steps have gone, so a scaled one changes the estimate. "
    "Train with torch.optim.AdamW and the learning rate that was found at the base batch"
)
_TWO_KINDS = (
    "its groups follow two laws, Muon's and AdamW's, in one optimizer. Make two of it: torch.optim.Muon for the "
    "matrices and torch.optim.AdamW for the rest, and attach both: anybatch.attach([muon, adamw], ...)"
)
_SOPHIA = (
    "it clips its steps by an estimate of the curvature that has a batch and a period of its own. Train with "
    "torch.optim.AdamW or Lion"
)
_LOOKAHEAD = (
    "it averages the weights once in k steps, whatever the batch. Attach to the optimizer inside of it, use that one "
    "alone, and average the weights on the clock with anybatch.ModelEMA"
)

# Every class of torch.optim and some of other packages: its row, or why it is refused and what to do. A name is that of
# the top package, as modules move between versions, and of the class; a derived class has the row of its base. The
# exponent is what makes constant gradients under noise go equally far per base iteration at any
# batch (tests/test_optimizers.py): 1 where the step is proportional to the gradient; 1/2 where it is divided by its own
# running size, which the noise dominates (Malladi et al. 2022). Decays on the clock: docs/architecture.md.
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
    # The maximum of n noisy gradients grows with n: only with n counted in steps does it fall as one gradient's size.
    "torch.Adamax": Family(
        0.5, "constant", eps=0.5, off_clock="it divides by a maximum, which grows with the number of gradients"
    ),
    "torch.Adadelta": Family(0.5, "constant", off_clock="it averages its own updates, whose size depends on rho"),
    "torch.SparseAdam": Family(
        0.5, "constant", eps=0.5, off_clock="a row's averages move when the row is used, not with the clock"
    ),
    # A sum grows by 1/r of its size in 1/r of the steps, so the step is r times as long by itself. In units of base
    # iterations the sum is r^2 times itself, which keeps it right while r changes.
    "torch.Adagrad": Family(0.0, "clock", rates=("lr_decay",), state={"step": 1, "sum": 2}, eps=1.0),
    # Orthogonalised, so its length says nothing of the gradient's, as with a sign: 1/2 without momentum, more with it,
    # as it is normalised after (`momentum.averaged_exponent`). lr multiplies its weight decay.
    "torch.Muon": _MUON,
    # min(lr, 1/sqrt(step)): with the count on the clock the second one, too, is multiplied by sqrt(r).
    "torch.Adafactor": replace(
        _ADAFACTOR,
        warning="Adafactor steps by the smaller of lr and 1 / sqrt(step), so a higher lr may be cut. With its step "
        "count on the clock that bound grows by the square root of the iterations and no further: keep to AdaScale(), "
        "SquareRoot() and decays='clock', or train with AdamW.",
    ),
    "torch.Rprop": "its steps do not depend on the learning rate after the first",
    "torch.ASGD": "it applies a learning rate one step late",
    "torch.LBFGS": "it takes differences of gradients for curvature, and its step length from a line search",
    "transformers.Adafactor": replace(_ADAFACTOR, names=("beta1",)),
    **dict.fromkeys(("muon.Muon", "muon.SingleDeviceMuon"), _MUON),
    **dict.fromkeys(
        (
            *(f"muon.{name}" for name in ("MuonWithAuxAdam", "SingleDeviceMuonWithAuxAdam")),
            *(f"pytorch_optimizer.{name}" for name in ("Muon", "DistributedMuon", "AdaMuon", "AdaGO", "NorMuon")),
        ),
        _TWO_KINDS,
    ),
    **dict.fromkeys(("lion_pytorch.Lion", "pytorch_optimizer.Lion"), _LION),
    **{f"bitsandbytes.{paged}Lion{bits}": _LION for paged in ("", "Paged") for bits in ("", "8bit", "32bit")},
    **{
        f"bitsandbytes.{paged}{name}{bits}": _WHOLE if name == "Adam" else replace(_WHOLE, decoupled=True)
        for paged in ("", "Paged")
        for name in ("Adam", "AdamW")
        for bits in ("", "8bit", "32bit")
    },
    **{f"pytorch_optimizer.{name}": _ADAM_LIKE for name in ("AdamP", "StableAdamW")},
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
# What `like=` may name: the rows that were measured by training (docs/same-training.md).
_LIKE = ("SGD", "Adam", "AdamW", "Muon")


def row_of(optimizer: Optimizer) -> Family | None:
    """The row of the class of torch.optim that `optimizer` is of or derived from; `None` where there is none.

    Raises:
        UnsupportedError: scaling has no meaning for this class.
    """
    name, row = _entry(optimizer)
    return row if name.startswith("torch.") else None


def family_of(optimizer: Optimizer, *, exponent: float | None, like: type[Optimizer] | None = None) -> Family:
    """The table's row for `optimizer`, that of the class it is `like`, or a row for a stated `exponent`.

    Of several optimizers `like` is about those without a row, and those derived from a class of torch.optim.

    Raises:
        InvalidValueError: `like` is no class that it may name, or has entries that this optimizer's groups have not.
        UnsupportedError: scaling has no meaning for this class, or it is unknown and nothing is stated.
    """
    name, row = _entry(optimizer)
    derived = name.startswith("torch.") and type(local_of(optimizer)) is not _torchs(name)
    if like is not None and (row is None or derived):  # a derived one may do another thing than its base
        return _family_like(optimizer, like)
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
            f"{own} takes a step in two halves, first_step() and second_step(), with a backward between them, as SAM "
            "does: attach to the optimizer inside of it, anybatch.attach(optimizer.base_optimizer, ...), which steps "
            "once, and call first_step(zero_grad=True)."
        )
    if any(group.get("relative_step") for group in local.param_groups):
        raise UnsupportedError(
            f"{own}(relative_step=True) sets its learning rate by itself, so that scaling 'lr' changes nothing: state "
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


def _torchs(name: str) -> type[Optimizer] | None:
    """The class of a name in the table, if this build of torch has it."""
    return getattr(torch.optim, name.removeprefix("torch."), None)


def _family_like(optimizer: Optimizer, like: type[Optimizer]) -> Family:
    row = next((_TABLE[f"torch.{name}"] for name in _LIKE if like is _torchs(name)), None)
    if not isinstance(row, Family):
        raise InvalidValueError(f"like must be one of torch.optim's {', '.join(_LIKE)}; got {like!r}.")
    own = type(local_of(optimizer)).__name__
    needed = {*row.names, *row.rates, *(("momentum",) if row.momentum else ())}
    lacking = [needed - group.keys() for group in optimizer.param_groups]
    if any(lacking):
        entries = ", ".join(sorted(set().union(*lacking)))
        if not all(lacking):
            raise InvalidValueError(
                f"{own} is said to be like {like.__name__}, and only some of its groups have {entries}: groups of two "
                "kinds follow two laws. Make two optimizers of it, one of them of a class in torch.optim, and attach "
                "both: anybatch.attach([first, second], rule=anybatch.AdaScale(like=...)), where like is about the one "
                "that is not torch's."
            )
        raise InvalidValueError(
            f"{own} is said to be like {like.__name__}, but its groups have no {entries}: name the entries so, or "
            "state an exponent."
        )
    # Of torch's own a group says so; nobody else's does. Where its second moment lies is not said. Most classes of
    # pytorch-optimizer count their steps, whether they use the count or not.
    decoupled = row.decoupled or issubclass(like, torch.optim.AdamW)
    return replace(row, decoupled=decoupled, second_moment="", state={"step": 1} | dict(row.state), stated=True)


def known_classes() -> str:
    """The classes of torch.optim that can be scaled, by name."""
    rows = ((name.partition("."), row) for name, row in _TABLE.items())
    return ", ".join(sorted(cls for (package, _, cls), row in rows if package == "torch" and isinstance(row, Family)))


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
        known = ", ".join(sorted(name.removeprefix("torch.") for name, row in _TABLE.items() if _weighs(row)))
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
