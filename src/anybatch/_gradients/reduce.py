"""The samples of a step from the windows of all ranks: one small all-reduce, with the same bits on every rank.

[Note: unit] With `reduction="mean"` each loss is divided by A. At the step `.grad` is the mean over the A
micro-batches. A micro-batch's own gradient is then A times the observed one. Otherwise `.grad` is their sum over a
known divisor d (`"sum"`: 1). The own gradient is then d times the observed one, and the mean is `.grad` times d / A.
Both keep the unit of the moments when the accumulation changes within a run. Over ranks `.grad` is a mean.

[Note: weights] In a mean with weights `w_i`, as of a language model's loss over all tokens of a step, the gradient
`h_i = w_i g_i` is observed. Its noise falls with its weight: `E ||h_i||^2 = w_i^2 sqnorm + w_i V`, with V the variance
of the mean. The number of equal micro-batches with the same noise is `n = (sum w)^2 / sum w^2`. Everything else is as
with n of them: `mean_square = n sum ||h_i||^2`, and a sample is S / n.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from math import isfinite, nan
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import UsageError
from anybatch._gradients.euclidean import EuclideanNorms
from anybatch._gradients.window import PAIR, Norms, Shares, Window

# Equal norms, summed over W ranks and divided again, differ by W roundings at most. Gradients that are not averaged
# differ by far more.
_ROUNDING = 1e-12, 4e-16

# The squared norm of a mean, relative to the mean of squared norms, is at most 1, or N / n with weights. The error of
# sums in bfloat16 is below this factor.
_IMPOSSIBLE = 1.1

_EQUAL = 1 + 1e-6  # effective micro-batches: below it one has all the weight, and there is no variance

_STEP = (EuclideanNorms.name, PAIR)  # norms that are not finite only if the step's gradients are not

Reduction = Literal["mean", "sum"] | int
Share = Literal["all", "active"]


@dataclass(frozen=True)
class Ranks:
    """The ranks whose gradients are averaged."""

    group: dist.ProcessGroup | None = None  # of all ranks that hold a part of the model; `None` for one rank
    size: int = 1  # W, the number of ranks with micro-batches of their own
    replicated: bool = True  # whether each of them holds the whole `.grad`, so that all must hold the same
    # Number of ranks that share each micro-batch, by tensor or pipeline parallelism; the group has W times as many.
    model: int = 1
    elsewhere: int = 0  # number of the optimizers' parameters in other stages of a pipeline

    @property
    def first(self) -> bool:
        """Whether this process is the first of them."""
        return self.group is None or dist.get_rank(self.group) == 0


class Counts(NamedTuple):
    """Numbers on the host of each rank, to be summed; the sum of squares shows whether all of them are equal."""

    backwards: float
    backwards_squared: float
    inverse_sizes: float
    sizes: float
    weights: float
    squares: float
    weighted: float
    checksum: float
    checksum_squared: float


class Layout:
    """The named parts of one flat float64 tensor, which is reduced and copied to the host; only this class orders it.

    `counts`              `[9]`, of Counts.
    `gradient_squared`    `[1]`, the square of this rank's `||.grad||^2`.
    `NAME.samples`        `[k]`, of each probe.
    `NAME.mean`           `[k]`, of each probe.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        probes = {f"{name}.{part}": size for name, size in sizes.items() for part in ("samples", "mean")}
        self._sizes = {"counts": len(Counts._fields), "gradient_squared": 1} | probes

    @property
    def size(self) -> int:
        """The length of the tensor."""
        return sum(self._sizes.values())

    def pack(self, parts: Mapping[str, Tensor], *, device: torch.device) -> Tensor:
        """The tensor of all parts."""
        return torch.cat([parts[name].to(device, non_blocking=True) for name in self._sizes])

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The parts, on the host."""
        return dict(zip(self._sizes, packed.cpu().split(list(self._sizes.values())), strict=True))


@dataclass(frozen=True)
class ReducedWindow:
    """The micro-batches of all ranks in one step."""

    shares: Shares  # of the N micro-batches on all ranks
    # Of the micro-batches' own gradients, by each probe's name; empty where the step was not measured or is a single
    # sample. For a single sample with a predecessor it has `PAIR`.
    norms: Mapping[str, Norms]
    sampled: bool = True  # whether the averages take the norms as a sample
    finite: bool = True  # whether all measured gradients are finite
    pair_inverse_size: float = 0.0  # with `PAIR`, one over the size of the earlier micro-batch
    skips: bool | None = None  # the value of the argument `skips`; `None` where it was not read


def reduce_window(
    window: Window,
    *,
    ranks: Ranks,
    reduction: Reduction,
    checksum: int = 0,
    share: Share | None = None,
    skips: Tensor | None = None,
) -> ReducedWindow:
    """Sum the windows of all ranks.

    With several ranks this is one all-reduce of a `Layout`, and one copy to the host. It includes `||.grad||^2`, so
    every rank computes with the same bits. The sums of squares show whether all ranks have the same counts and values.

    Args:
        window: This rank's window.
        ranks: The ranks to sum over.
        reduction: As for `attach`.
        checksum: Of the values that must be the same on every rank. Below 2 ** 16, so that sums of squares are exact.
        share: Under `Join`, where ranks may have run out of data, DDP's divisor of the sum of the gradients: `"all"`
            ranks or those still `"active"`. Otherwise `None`.
        skips: A number on a device that is copied to the host with the norms, on one rank.

    Raises:
        UsageError: DDP or FSDP2 did not average the gradients of this step; the ranks have different numbers of
            backwards, clocks, averages, learning rates or, under DDP, gradients; `.grad` is no mean.
    """
    if ranks.group is None:
        return _on_one_rank(window, reduction, skips)
    euclidean = window.norms.get(EuclideanNorms.name)
    if euclidean is not None and euclidean.mean is None:
        raise UsageError(
            "The gradients of this step are not averaged over the ranks: the last backward before optimizer.step(), "
            "with its forward, must run outside of no_sync(), or with set_requires_gradient_sync(True)."
        )
    layout = Layout(window.sizes)
    device = _device_of(ranks.group) if euclidean is None else euclidean.samples.device
    packed = layout.pack(_parts(window, checksum), device=device)
    dist.all_reduce(packed, group=ranks.group)
    return _over_ranks(layout.unpack(packed), window, ranks=ranks, reduction=reduction, share=share)


def join_reduction(sizes: Mapping[str, int], ranks: Ranks) -> None:
    """Take part in `reduce_window` on the other ranks with nothing to add."""
    if ranks.group is not None:
        size = Layout(sizes).size
        dist.all_reduce(torch.zeros(size, dtype=torch.float64, device=_device_of(ranks.group)), group=ranks.group)


def _parts(window: Window, checksum: int) -> dict[str, Tensor]:
    """This rank's part of the all-reduce."""
    (_, *sums), backwards = astuple(window.shares), window.backwards
    counts = Counts._make((backwards, backwards**2, *sums, checksum, checksum**2))
    parts = {"counts": torch.tensor(counts, dtype=torch.float64), "gradient_squared": torch.zeros(1).double()}
    for name, size in window.sizes.items():
        norms = window.norms.get(name)
        if norms is None or norms.mean is None:  # nan on one rank makes the sum nan: not measured on any
            parts[f"{name}.samples"] = torch.full((size,), nan, dtype=torch.float64)
            parts[f"{name}.mean"] = torch.zeros(size, dtype=torch.float64)
        else:
            parts[f"{name}.samples"], parts[f"{name}.mean"] = norms.samples, norms.mean
            if name == EuclideanNorms.name:
                parts["gradient_squared"] = norms.mean.square()
    return parts


def _on_one_rank(window: Window, reduction: Reduction, skips: Tensor | None) -> ReducedWindow:
    if not window.norms:
        return _in_own_unit({}, window, window.shares, reduction=reduction, active=1)
    parts = {f"{name}.samples": each.samples for name, each in window.norms.items()}
    parts |= {f"{name}.mean": each.mean for name, each in window.norms.items() if each.mean is not None}
    if skips is not None:
        parts["skips"] = skips.reshape(1)
    found = _to_host(parts, device=window.norms[EuclideanNorms.name].samples.device)
    norms = {}
    for name in window.norms:
        samples, mean = found[f"{name}.samples"], found.get(f"{name}.mean")
        # Without a mean the window is shorter than the last one. It has no norms, unless these are not finite, so that
        # the step is skipped.
        if mean is not None or not bool(samples.isfinite().all()):
            norms[name] = Norms(samples, samples if mean is None else mean)
    reduced = _in_own_unit(norms, window, window.shares, reduction=reduction, active=1)
    return replace(reduced, skips=bool(found["skips"]) if skips is not None else None)


def _to_host(parts: Mapping[str, Tensor], *, device: torch.device) -> dict[str, Tensor]:
    """The parts on the host, by one copy from `device`."""
    packed = torch.cat([part.to(device, torch.float64, non_blocking=True) for part in parts.values()])
    return dict(zip(parts, packed.cpu().split([part.numel() for part in parts.values()]), strict=True))


def _over_ranks(
    found: Mapping[str, Tensor], window: Window, *, ranks: Ranks, reduction: Reduction, share: Share | None
) -> ReducedWindow:
    totals, sums = Counts(*found["counts"].tolist()), Counts(*(found["counts"] / ranks.model).tolist())
    count, active, mean_factor = round(sums.backwards), ranks.size, 1.0
    samples = count if sums.weighted else round(sums.weights)  # without weights an empty micro-batch has 0 there
    shares = Shares(samples, sums.inverse_sizes, sums.sizes, sums.weights, sums.squares, round(sums.weighted))
    if share is not None:  # with equal counts on the active ranks: (sum)^2 / sum of squares
        active = round(sums.backwards**2 / sums.backwards_squared) if sums.backwards_squared else 1
        mean_factor = ranks.size / active * ((ranks.size / active) ** 2 if share == "all" else 1.0)
    members = active * ranks.model  # with equal values on each, (sum)^2 is so many times the sum of squares
    if members * round(totals.backwards_squared) != round(totals.backwards) ** 2:
        raise UsageError(
            f"The ranks saw different numbers of backwards before this step (this rank: {window.backwards}, all "
            f"{ranks.size} ranks: {count}). Run the same number on every rank; drop_last=True keeps the data even."
        )
    if members * round(totals.checksum_squared) != round(totals.checksum) ** 2:
        raise UsageError(
            "The ranks have different clocks, averages, learning rates or positions of the schedule, so their steps "
            "and then their weights differ. Load the same state of the controller, the optimizer and the scheduler on "
            "every rank, and give every rank the same settings."
        )
    norms = {
        name: Norms(found[f"{name}.samples"], found[f"{name}.mean"] * mean_factor)
        for name in window.sizes
        if not (bool(found[f"{name}.samples"].isnan().any()) and bool(found[f"{name}.mean"].isfinite().all()))
    }
    if EuclideanNorms.name in norms and ranks.replicated:
        each = float(found[f"{EuclideanNorms.name}.mean"]) / active
        _check_same_gradients(each, float(found["gradient_squared"]) / active, ranks=active)
    return _in_own_unit(norms, window, shares, reduction=reduction, active=active)


def _in_own_unit(
    norms: Mapping[str, Norms], window: Window, shares: Shares, *, reduction: Reduction, active: int
) -> ReducedWindow:
    """The norms of the micro-batches' own gradients and of their mean; see [Note: unit]."""
    _check_weights(shares, reduction)
    finite = {
        name: all(bool(t.isfinite().all()) for t in (each.samples, each.mean) if t is not None)
        for name, each in norms.items()
    }
    if shares.count == 0:
        return ReducedWindow(shares, {}, window.sampled, all(finite.get(name, True) for name in _STEP))
    effective = shares.effective
    alone = shares.count == 1 or (shares.weighted > 0 and effective < _EQUAL)
    divisor = divisor_of(reduction, effective / active)
    own: dict[str, Norms] = {}
    for name, each in norms.items():
        if (name == PAIR) != alone or each.mean is None or not (finite[name] or name in _STEP):
            continue
        mean = each.mean
        if reduction != "mean":
            mean = mean / (1 / divisor if name == PAIR else effective / active / divisor) ** 2
        own[name] = Norms(each.samples * divisor**2, mean)
    if EuclideanNorms.name in own:
        _check_mean(own[EuclideanNorms.name], shares)
    return ReducedWindow(
        shares, own, window.sampled, all(finite.get(name, True) for name in _STEP), window.pair_inverse_size
    )


def _check_mean(norms: Norms, shares: Shares) -> None:
    """Raise if `.grad` is longer than a mean of the micro-batches' gradients can be."""
    samples, square_mean = float(norms.samples) / shares.effective, float(norms.mean if norms.mean is not None else nan)
    if isfinite(square_mean) and square_mean > _IMPOSSIBLE * samples * shares.count / shares.effective:
        raise UsageError(
            f"The squared norm of .grad, {square_mean:.4g}, is above the mean of the squared norms of the "
            f"{shares.count} gradients, {samples:.4g}, so .grad is not their mean. Is .grad a sum over the ranks (a "
            "communication hook, FSDP2's set_gradient_divide_factor), a sum over micro-batches (pass attach "
            "reduction='sum'), weighted (set controller.weight), or changed by a hook after its accumulation?"
        )


def divisor_of(reduction: Reduction, micro_batches: float) -> float:
    """The divisor of the sum of a window's `micro_batches` gradients."""
    if reduction == "mean":
        return micro_batches
    return 1.0 if reduction == "sum" else float(reduction)


def _check_weights(shares: Shares, reduction: Reduction) -> None:
    """Raise if the weights of a step's micro-batches do not make a mean."""
    if not shares.weighted:
        return
    if shares.weighted != shares.count:
        raise UsageError(
            f"{shares.weighted} of the {shares.count} micro-batches of this step had a weight: set controller.weight "
            "before each backward, on every rank, or never."
        )
    if reduction != "mean":
        raise UsageError(
            f"controller.weight is for losses that add up to a weighted mean, and attach has reduction={reduction!r}: "
            "divide each loss by the weights of the whole step, on all ranks, and leave reduction out."
        )
    if shares.weights == 0:
        raise UsageError("The weights of this step's micro-batches are all 0: set one above 0, since a mean needs it.")


def _check_same_gradients(mean: float, mean_square: float, *, ranks: int) -> None:
    """Raise if the squared norms of the ranks' `.grad` differ, by their mean and mean square."""
    if isfinite(mean_square) and mean_square - mean**2 > max(_ROUNDING[0], _ROUNDING[1] * ranks) * mean**2:
        raise UsageError(
            "The ranks hold different gradients after the last backward of this step: nothing has averaged them. Call "
            "the DistributedDataParallel module itself, not its .module, once before each backward, and run the last "
            "one and its forward outside of no_sync()."
        )


First = TypeVar("First")


def check_same(settings: Mapping[str, object], *, ranks: Ranks, first: First, only_first: Mapping[str, bool]) -> First:
    """Compare the settings of all ranks, a collective, and return `first` of the first rank.

    `only_first` has, by name, whether an argument that takes effect on the first rank alone was passed.

    Raises:
        UsageError: a setting differs, or an argument of `only_first` was passed on another rank alone.
    """
    if ranks.group is None:
        return first
    if ranks.elsewhere:  # the stages of a pipeline differ in size
        settings = {name: value for name, value in settings.items() if not name.startswith("number of trained")}
    found: list[Any] = [None] * ranks.size * ranks.model
    dist.all_gather_object(found, (dict(settings), first, dict(only_first)), group=ranks.group)
    for name in dict.fromkeys(name for of_rank, _, _ in found for name in of_rank):
        given = [of_rank.get(name, "nothing") for of_rank, _, _ in found]
        if any(each != given[0] for each in given):
            values = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(given))
            raise UsageError(
                f"attach was given another {name} on other ranks ({values}). Their steps, and then their weights, "
                "would differ: give every rank the same."
            )
    for name in only_first:
        others = [rank for rank, (_, _, given) in enumerate(found) if given[name]]
        if others and others[0] != 0:
            raise UsageError(
                f"attach was given a {name} on rank {others[0]} and none on rank 0. Only rank 0 writes: pass it there."
            )
    of_first: First = found[0][1]
    return of_first


def replicated_ranks(ddp: DistributedDataParallel | None, given: dist.ProcessGroup | None) -> Ranks:
    """The ranks of a model that is whole on each of them.

    Raises:
        UsageError: there are several ranks, and nothing averages their gradients.
    """
    group = given if given is not None else getattr(ddp, "process_group", None)
    if group is None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UsageError(
                f"torch.distributed runs with {dist.get_world_size()} ranks, but the model is not wrapped in "
                "DistributedDataParallel. Pass attach the wrapped module (the result of accelerator.prepare or "
                "fabric.setup; trainer.model in Lightning, trainer.model_wrapped in the Trainer). If every rank trains "
                "its own model, pass a process_group of one rank."
            )
        return Ranks()
    size = dist.get_world_size(group)
    if ddp is None and size > 1:
        raise UsageError(
            f"A process_group of {size} ranks needs a model in DistributedDataParallel: pass attach the wrapped module."
        )
    return Ranks(group, size) if size > 1 else Ranks()


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """A device for the reductions of this group's backend."""
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
