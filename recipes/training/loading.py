"""How data comes to the device: by how many processes, ahead of the step that needs it, and from pinned memory."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

MOST = 16  # workers of a process: more than that compete for memory rather than load faster
AHEAD = 4  # batches that each worker prepares: an evaluation takes longer than a step


def workers_for(processes: int, *, device: bool) -> int:
    """The loading processes of each of `processes` that share this machine's cores; none where they train on cores."""
    if not device:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, max(1, cores // processes - 1))  # a core stays with the process itself


def loader(
    data: Dataset[Any],
    order: Iterable[Any],
    *,
    workers: int,
    collate: Callable[[list[Any]], Any] | None = None,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """Batches of `data` by the lists of indices in `order`; its workers stay from one pass to the next."""
    ahead: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": AHEAD} if workers else {}
    return DataLoader(
        data,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=generator,
        **ahead,
    )
