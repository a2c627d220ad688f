"""The processes of a run, and its checkpoint: the same file whether one rank wrote it, DDP's or FSDP2's."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from recipes.training import checkpoint
from recipes.training.task import DataError, Task

_NAME = "checkpoint.pt"
_CONTAINERS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Place:
    """Which process this is, of how many, and its device."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def moved(self, batch: Any) -> Any:
        """The tensors of `batch` on the device; lists, tuples and dictionaries keep their structure."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, dict):
            return {key: self.moved(value) for key, value in batch.items()}
        if isinstance(batch, list | tuple):
            return type(batch)(self.moved(value) for value in batch)
        return batch

    def summed(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over all ranks."""
        if self.ranks > 1:
            numbers = numbers.clone()
            dist.all_reduce(numbers)
        return numbers

    def wait(self) -> None:
        """For all other ranks to come here."""
        if self.ranks > 1:
            dist.barrier()


def here() -> Place:
    """This process, in the process group if there is one."""
    grouped = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    return Place(rank, ranks, device)


@contextmanager
def process_group() -> Iterator[Place]:
    """Join the other ranks where torchrun started this process, and leave together with them."""
    if "RANK" not in os.environ:
        yield here()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    hours = timedelta(hours=2)  # the others wait while rank 0 prepares the data
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=hours)
    try:
        yield here()
        dist.barrier()  # a rank that failed does not come here: torchrun ends the others
    finally:
        dist.destroy_process_group()


def tuned(net: nn.Module, task: Task, *, device: torch.device, precision: str, fsdp: bool) -> nn.Module:
    """`net` on the device, and what CUDA is told for it.

    Kernels are tried out where all batches have one shape; float32 products may have TF32's ten bits beside bf16's
    seven and fp16's ten, and with `--precision tf32`; with fp32 that is as torch has it, in convolutions alone.
    Convolutions are faster with the channels last. FSDP2 takes no such weights.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = task.one_size
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        if task.convolutions and not fsdp:
            return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.to(device)


def same_buffers(net: nn.Module, place: Place) -> None:
    """Rank 0's on all: each has its own running averages of BatchNorm, under DDP until the next forward."""
    if place.ranks > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def wrap(net: nn.Module, *, place: Place, fsdp: bool, compiled: bool) -> nn.Module:
    """`net` under DDP, or sharded in place with FSDP2, where there are several ranks."""
    if fsdp:
        for block in blocks(net):
            fully_shard(block)
        fully_shard(net)
    if compiled:
        # Not net.compile(): of torch's own classes, such as a Sequential, it compiles some of the blocks alone.
        net.forward = torch.compile(net.forward)
    return DistributedDataParallel(net) if place.ranks > 1 and not fsdp else net


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of lists and sequences that have parameters: what FSDP2 gathers one at a time."""
    for child in module.children():
        if not isinstance(module, _CONTAINERS) or isinstance(child, _CONTAINERS):
            yield from blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def without_reduction(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """DDP reduces once a step, in the last backward; FSDP2 in every one, so that nobody holds a whole gradient."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def model_state(net: nn.Module) -> dict[str, Any]:
    """The whole model's weights on the CPU, on rank 0; to be called by every rank."""
    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # On the CPU they are the model's own tensors, which change.
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def optimizer_state(net: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The whole state of all optimizers on the CPU, on rank 0; to be called by every rank."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(net, optimizers, options=options)


def load_model(net: nn.Module, state: dict[str, Any]) -> None:
    """Each rank takes its part."""
    set_model_state_dict(net, state, options=StateDictOptions(full_state_dict=True))


def load_optimizer(net: nn.Module, optimizers: Sequence[Optimizer], state: dict[str, Any]) -> None:
    """Each rank takes its part."""
    set_optimizer_state_dict(net, optimizers, state, options=StateDictOptions(full_state_dict=True))


def save(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at once: a kill at any moment leaves the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME
    checkpoint.write(state, path, scratch=path.with_suffix(".new"))


def load(folder: Path, *, same: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint, or `None` where there is none yet.

    Raises:
        DataError: it cannot be read, or is of a run whose options in `same` were others.
    """
    path = folder / _NAME
    saved = checkpoint.read(path, of="train.py", key="options")
    if saved is None:
        return None
    options = saved["options"]
    for name, value in same.items():
        if options.get(name) != value:
            raise DataError(
                f"{path} is of a run with {name}={options.get(name)!r}, not {value!r}: choose another --out, or remove "
                "the folder to start anew."
            )
    return saved
