"""From each rank's window to the samples of the step: one small all-reduce, the same bits on every rank.

[Note: unit] `.grad` at the step is the mean over a window's A micro-batches (`reduction="mean"`: each loss was divided
by A), so a micro-batch's own gradient is A times the observed one; or it is their sum (`"sum"`), and then the mean is
`.grad` divided by A. Only so do the moments keep their unit when the accumulation changes in mid-run. Over ranks
`.grad` is a mean.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import UsageError
from anybatch._gather import Window
from anybatch._norms import SquaredNorms

Reduction = Literal["mean", "sum"]


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


@dataclass(frozen=True)
class Observation:
    """What all ranks together saw in one step.

    Args:
        count: N, micro-batches on all ranks.
        inverse_sizes: sum over them of one over their size.
        norms: squared norms of the step's samples; `None` where the step was not measured or is a single sample.
        pair: squared norms of this step's gradient and the one before, for a single sample; else `None`.
    """

    count: int
    inverse_sizes: float
    norms: SquaredNorms | None
    pair: SquaredNorms | None


def observation(window: Window, *, ranks: Ranks, reduction: Reduction) -> Observation:
    """Sum the windows of the ranks and put them in units of a single micro-batch.

    Costs one device-to-host copy, and with several ranks one all-reduce of five float64 numbers. `||.grad||^2` is
    summed with the rest, over the shards or divided by the number of replicas, so that every rank computes with the
    same bits.

    Raises:
        UsageError: the ranks saw different numbers of backwards, or DDP never averaged the gradients of this step.
    """
    group, size = ranks.group, ranks.size
    backwards = window.backwards
    measured = window.samples_square is not None
    if measured and window.grad_square is None:
        raise UsageError(
            "The gradients of this step were never averaged over the ranks: the last backward before "
            "optimizer.step() must run outside of no_sync(), or with set_requires_gradient_sync(True)."
        )
    device = window.samples_square.device if window.samples_square is not None else torch.device("cpu")
    if group is not None and not measured:
        device = _device_of(group)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack([zero if n is None else n for n in (window.samples_square, window.grad_square)])
    if group is None:
        count, inverse_sizes = backwards, window.inverse_sizes
        pair = () if window.pair is None else (window.pair.mean_square, window.pair.square_mean)
        numbers = torch.cat([norms, *(n.reshape(1) for n in pair)]).tolist() if measured else [0.0, 0.0]
    else:
        counts = torch.tensor([backwards, backwards**2, window.inverse_sizes], dtype=torch.float64, device=device)
        packed = torch.cat([norms, counts])
        packed[1] /= ranks.replicas
        dist.all_reduce(packed, group=group)
        numbers = packed.tolist()
        count, inverse_sizes = round(numbers[2]), numbers[4]
        if size * numbers[3] != numbers[2] ** 2:
            raise UsageError(
                f"The ranks saw different numbers of backwards before this step (this rank: {backwards}, all {size} "
                f"ranks: {count}). Every rank must accumulate equally often; drop_last=True keeps the data even."
            )
    if not measured:
        return Observation(count, inverse_sizes, None, None)
    samples, grad = numbers[0], numbers[1]
    if reduction == "mean":
        samples *= backwards**2
    else:
        grad /= backwards**2
    if count > 1:
        return Observation(count, inverse_sizes, SquaredNorms(samples / count, grad, count), None)
    two = SquaredNorms(numbers[2], numbers[3], 2) if len(numbers) == 4 else None
    return Observation(count, inverse_sizes, None, two)


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
                "DistributedDataParallel. Give attach the wrapped module; if every rank trains for itself, give it a "
                "process_group of one rank."
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
