"""From each rank's window to the samples of the step: one small all-reduce, the same bits on every rank.

[Note: unit] `.grad` at the step is the mean over a window's A micro-batches (`reduction="mean"`: each loss was divided
by A), so a micro-batch's own gradient is A times the observed one; or it is their sum over a known divisor d (`"sum"`:
1), and then that is d times the observed one, and the mean is `.grad` times d / A. Only so do the moments keep their
unit when the accumulation changes in mid-run. Over ranks `.grad` is a mean.

[Note: weights] In a mean with weights `w_i` (that of a language model's loss over all tokens of a step), the gradient
`h_i = w_i g_i` is observed, and micro-batches tell as much as their weight: `E ||h_i||^2 = w_i^2 sqnorm + w_i V`, with
V the variance of the mean. With `n = (sum w)^2 / sum w^2`, as many as N equal ones would be, all else is as with n of
them: `mean_square = n sum ||h_i||^2`, and a sample is S / n.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, isnan, nan
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import UsageError
from anybatch._gradients.norms import SquaredNorms
from anybatch._gradients.window import ByLayer, Shares, Window

# Equal norms, summed over ranks and divided again; gradients that nothing averaged differ by far more.
_ROUNDING = 1e-12

# The squared norm of a mean over the mean of squared norms is at most 1, N / n with weights; sums in bfloat16 are off
# by less than this.
_IMPOSSIBLE = 1.1

_EQUAL = 1 + 1e-6  # effective micro-batches: one that has all the weight shows no variance

Reduction = Literal["mean", "sum"] | int
Share = Literal["all", "active"]


@dataclass(frozen=True)
class Ranks:
    """The ranks whose gradients are averaged.

    Args:
        group: their process group; `None` for one rank.
        size: how many they are, W.
        replicas: how many of them hold the same part of `.grad`: all under DDP, one under FSDP2.
    """

    group: dist.ProcessGroup | None = None
    size: int = 1
    replicas: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the first of them."""
        return self.group is None or dist.get_rank(self.group) == 0


class Sums(NamedTuple):
    """What the ranks add up, in this order; behind it come two more norms in Adam's metric."""

    samples: float
    grad: float
    backwards: float
    backwards_squared: float
    inverse_sizes: float
    sizes: float
    weights: float
    squares: float
    weighted: float
    checksum: float
    checksum_squared: float
    grad_squared: float


@dataclass(frozen=True)
class Observation:
    """What all ranks together saw in one step.

    Args:
        shares: of the N micro-batches on all ranks.
        norms: squared norms of the step's samples; `None` where the step was not measured or is a single sample.
        pair: squared norms of this step's gradient and the one before, for a single sample; else `None`.
        weighed: `norms` in Adam's metric; `None` where it was not asked for or some weight was not known on some rank.
        layers: `norms` by layer; empty at a step that nobody looks at, and where they are not known on some rank.
    """

    shares: Shares
    norms: SquaredNorms | None
    pair: SquaredNorms | None
    weighed: SquaredNorms | None = None
    layers: Mapping[str, SquaredNorms] = field(default_factory=dict)


@dataclass
class Flight:
    """A window on its way over the ranks; `land()` waits for it.

    Args:
        window: this rank's window.
        ranks: the ranks it is summed over.
        reduction: what the user's `.grad` is.
        numbers: float64 tensor `[2]`, `[4]` with a pair, or `[12]` over several ranks, in Adam's metric two more, and
            two more for each layer where the layers are looked at; empty where one rank has only counted.
        share: under `Join`, where some ranks may have run out of data: what DDP divides the sum of the gradients by,
            `"all"` ranks or those still `"active"`; else `None`.
        work: the reduction under way, or `None`.
        copied: an event after which `numbers`, in pinned memory, may be read; or `None`.
    """

    window: Window
    ranks: Ranks
    reduction: Reduction
    numbers: Tensor
    share: Share | None = None
    work: dist.Work | None = None
    copied: torch.cuda.Event | None = None

    def land(self) -> Observation:
        """What all ranks together saw.

        Raises:
            UsageError: the ranks saw different numbers of backwards, have come to different clocks or averages, or hold
                different gradients under DDP; or `.grad` is no mean.
        """
        if self.work is not None:
            self.work.wait()
        if self.copied is not None:
            self.copied.synchronize()
        return _observation(self.numbers.tolist(), self)


def launch(
    window: Window,
    *,
    ranks: Ranks,
    reduction: Reduction,
    checksum: int = 0,
    ahead: bool = False,
    share: Share | None = None,
) -> Flight:
    """Begin to sum the windows of the ranks.

    With several ranks that is one all-reduce of twelve float64 numbers, 14 with Adam's metric, and two more for each
    layer where layers are looked at, nan at the steps between. `||.grad||^2` is summed with the rest, over the shards
    or divided by the number of replicas, so that every rank computes with the same bits; the sums of squares beside the
    sums tell whether all ranks counted, know and hold the same. Landing costs the one device-to-host copy of a step;
    with `ahead=True` the copy runs beside the computation, and landing a step later waits for nothing.

    Args:
        window: this rank's window.
        ranks: the ranks it is summed over.
        reduction: what the user's `.grad` is.
        checksum: of what must be the same on every rank, below 2 ** 20, so that sums of squares are exact.
        ahead: start the copy to the host at once.
        share: as in `Flight`.

    Raises:
        UsageError: DDP or FSDP2 never averaged the gradients of this step.
    """
    measured = window.samples_square is not None
    if measured and window.grad_square is None:
        raise UsageError(
            "The gradients of this step are not averaged over the ranks: the last backward before optimizer.step(), "
            "with its forward, must run outside of no_sync(), or with set_requires_gradient_sync(True)."
        )
    if window.samples_square is not None:
        device = window.samples_square.device
    elif ranks.group is not None:
        device = _device_of(ranks.group)
    else:  # counted on one rank: nothing to sum and nothing to read
        return Flight(window, ranks, reduction, torch.empty(0))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    # Where FSDP2 keeps shards on the host, `.grad` is there and what the micro-batches gave is on the device.
    norms = [zero if n is None else n.to(device) for n in (window.samples_square, window.grad_square)]
    weighed = [] if window.weighed is None else [window.weighed.samples_square, window.weighed.grad_square]
    # Not known on one rank is not known in the sum, on every rank alike: nan.
    tail = [torch.full_like(zero, nan) if n is None else n.to(device) for n in weighed]
    if ranks.group is None:
        pair = [] if window.pair is None else [n.to(device) for n in (window.pair.mean_square, window.pair.square_mean)]
        packed = torch.stack([*norms, *pair, *tail])
        if window.layers is not None:
            packed = torch.cat([packed, *_by_layer(window.layers, like=packed)])
        flight = Flight(window, ranks, reduction, packed)
    else:
        backwards, shares = window.backwards, window.shares
        told = [shares.inverse_sizes, shares.sizes, shares.weights, shares.squares, shares.weighted]
        known = [backwards, backwards**2, *told, checksum, checksum**2]
        counts = torch.tensor(known, dtype=torch.float64).to(device, non_blocking=True)
        if not measured:  # on no rank then, whatever the others saw: one alone may have come by hooks of the user's
            norms[0] = torch.full_like(zero, nan)
        packed = torch.cat([torch.stack(norms), counts, norms[1].square()[None], *(n[None] for n in tail)])
        packed[1] /= ranks.replicas
        if tail:
            # Each rank has weighed its own shard of its own micro-batches. Micro-batches are exchangeable, so the same
            # shard of the other ranks' is expected to be as long.
            packed[-2] *= ranks.size / ranks.replicas
            packed[-1] /= ranks.replicas
        if window.layers is not None:
            samples, grads = _by_layer(window.layers, like=packed)
            packed = torch.cat([packed, samples, grads / ranks.replicas])
        work = dist.all_reduce(packed, group=ranks.group, async_op=True)
        flight = Flight(window, ranks, reduction, packed, share, work)
    if ahead and device.type == "cuda":  # pragma: no cover
        _copy_ahead(flight)
    return flight


def _copy_ahead(flight: Flight) -> None:  # pragma: no cover
    """Start the copy to the host behind the reduction, on the current stream: the host waits for neither."""
    if flight.work is not None:
        flight.work.wait()  # NCCL: the stream waits, not the host
        flight.work = None
    buffer = torch.empty(flight.numbers.shape, dtype=torch.float64, pin_memory=True)
    buffer.copy_(flight.numbers, non_blocking=True)
    flight.numbers, flight.copied = buffer, torch.cuda.Event()
    flight.copied.record()


def _by_layer(layers: ByLayer, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """The norms by layer; nan where they are not known, which the sum is then on every rank alike."""
    unknown = like.new_full((len(layers.names),), nan)
    found = [unknown if squares is None else squares for squares in (layers.samples_squares, layers.grad_squares)]
    return found[0].to(like.device), found[1].to(like.device)


def shadow(ranks: Ranks, *, weighed: bool) -> None:
    """Take part in `launch` on the other ranks with nothing to add."""
    if ranks.group is not None:
        numbers = torch.zeros(len(Sums._fields) + 2 * weighed, dtype=torch.float64, device=_device_of(ranks.group))
        dist.all_reduce(numbers, group=ranks.group)


def _observation(numbers: list[float], flight: Flight) -> Observation:
    window, ranks, shares = flight.window, flight.ranks, flight.window.shares
    names = () if window.layers is None else window.layers.names
    numbers, by_layer = numbers[: len(numbers) - 2 * len(names)], numbers[len(numbers) - 2 * len(names) :]
    backwards, count = window.backwards, window.backwards
    share, active = 1.0, ranks.size
    measured = window.samples_square is not None
    if ranks.group is not None:
        sums = Sums(*numbers[: len(Sums._fields)])
        count = round(sums.backwards)
        shares = Shares(count, sums.inverse_sizes, sums.sizes, sums.weights, sums.squares, round(sums.weighted))
        if flight.share is not None:  # of equal counts among `active` ranks, the sum squared over the sum of squares
            active = round(sums.backwards**2 / sums.backwards_squared) if sums.backwards_squared else 1
            mean = ranks.size / active if flight.share == "all" else 1.0
            share = ranks.replicas / active * mean**2
        if active * sums.backwards_squared != sums.backwards**2:
            raise UsageError(
                f"The ranks saw different numbers of backwards before this step (this rank: {backwards}, all "
                f"{ranks.size} ranks: {count}). Every rank must accumulate equally often; drop_last=True keeps the "
                "data even."
            )
        if round(sums.checksum_squared) * active != round(sums.checksum) ** 2:
            raise UsageError(
                "The ranks have come to different clocks or averages, so their steps and then their weights differ: "
                "load the same state of the controller on every rank, and train every rank with the same steps."
            )
        # Of a gradient that is not finite the sum is not either, and the step is skipped on every rank.
        measured = not (isnan(sums.samples) and isfinite(sums.grad))
        if measured and ranks.replicas == ranks.size:
            _check_same_gradients(sums.grad * ranks.size / active, sums.grad_squared / active)
    _check_weights(shares, flight.reduction)
    if not measured:
        return Observation(shares, None, None)
    if count == 1:
        two = None if window.pair is None else SquaredNorms(numbers[2], numbers[3], 2)
        return Observation(shares, None, two)
    effective = shares.effective
    if shares.weighted and effective < _EQUAL:
        return Observation(shares, None, None)
    divisor = divisor_of(flight.reduction, effective / active)

    def norms(samples: float, grad: float) -> SquaredNorms:
        if flight.reduction != "mean":
            grad /= (backwards / divisor) ** 2
        return SquaredNorms(samples * divisor**2 / effective, grad * share, count)

    euclidean = norms(*numbers[:2])
    most = _IMPOSSIBLE * euclidean.mean_square * count / effective
    if isfinite(euclidean.square_mean) and euclidean.square_mean > most:
        raise UsageError(
            f"The squared norm of .grad, {euclidean.square_mean:.4g}, is above the mean of the squared norms of the "
            f"{count} gradients that it should be the mean of, {euclidean.mean_square:.4g}, which no mean is. Is .grad "
            "a sum over the ranks (a communication hook, FSDP2's set_gradient_divide_factor), a sum over "
            "micro-batches (attach(reduction='sum')), weighted (controller.weight), or changed by a hook after its "
            "accumulation?"
        )
    weighed = None if window.weighed is None else norms(*numbers[-2:])
    if weighed is not None and not (isfinite(weighed.mean_square) and isfinite(weighed.square_mean)):
        weighed = None
    layers = {}
    if all(map(isfinite, by_layer)):
        pairs = zip(by_layer[: len(names)], by_layer[len(names) :], strict=True)
        layers = {name: norms(*pair) for name, pair in zip(names, pairs, strict=True)}
    return Observation(shares, euclidean, None, weighed, layers)


def divisor_of(reduction: Reduction, micro_batches: float) -> float:
    """What the sum of a window's `micro_batches` gradients was divided by."""
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
            f"controller.weight is for losses that add up to a weighted mean, and attach was given reduction="
            f"{reduction!r}: divide each loss by the weights of the whole step, on all ranks, and leave reduction out."
        )
    if shares.weights == 0:
        raise UsageError("The weights of this step's micro-batches are all 0: such a step has no mean to go by.")


def _check_same_gradients(mean: float, mean_square: float) -> None:
    """Raise if the squared norms of the ranks' `.grad`, by their mean and mean square, are not one number."""
    if isfinite(mean_square) and mean_square - mean**2 > _ROUNDING * mean**2:
        raise UsageError(
            "The ranks hold different gradients after the last backward of this step: nothing has averaged them. Call "
            "the DistributedDataParallel module itself, not its .module, once before each backward, and let the last "
            "one and its forward run outside of no_sync()."
        )


def check_same(settings: Mapping[str, object], *, ranks: Ranks) -> None:
    """Compare what must be the same on every rank; a collective where there are several.

    Raises:
        UsageError: something is not.
    """
    if ranks.group is None:
        return
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, dict(settings), group=ranks.group)
    for name in settings:
        if any(other[name] != found[0][name] for other in found):
            values = ", ".join(f"rank {rank}: {other[name]}" for rank, other in enumerate(found))
            raise UsageError(
                f"attach was given another {name} on other ranks ({values}), so that their steps, and then their "
                "weights, would differ: give every rank the same."
            )


def replicated_ranks(ddp: DistributedDataParallel | None, given: dist.ProcessGroup | None) -> Ranks:
    """The ranks of a model that is whole on each of them.

    Raises:
        UsageError: there are several ranks, but nothing that averages their gradients.
    """
    group = given if given is not None else getattr(ddp, "process_group", None)
    if group is None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UsageError(
                f"torch.distributed runs with {dist.get_world_size()} ranks, but the model is not wrapped in "
                "DistributedDataParallel. Give attach the wrapped module (what accelerator.prepare or fabric.setup "
                "returned; trainer.model in Lightning, trainer.model_wrapped in the Trainer); if every rank trains for "
                "itself, give it a process_group of one rank."
            )
        return Ranks()
    size = dist.get_world_size(group)
    if ddp is None and size > 1:
        raise UsageError("A process_group of several ranks needs a model wrapped in DistributedDataParallel.")
    return Ranks(group, size, size) if size > 1 else Ranks()


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """A device on which this group's backend can reduce."""
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
