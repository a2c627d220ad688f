"""Provenance of a run for a record's header: software, machine and configuration."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anybatch._scaling import BatchSize
from anybatch._version import __version__


def environment() -> dict[str, Any]:
    """Time, versions, machine, seed, and the working directory's commit; `None` outside of a repository."""
    return {
        "time": time.time(),
        "anybatch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": _commit(),
        "seed": torch.initial_seed(),
    }


def run_config(
    optimizers: Sequence[Optimizer],
    *,
    rule: object,
    noise_factor: float,
    total: float | None,
    batch: BatchSize,
    ranks: int,
    trained: Sequence[Tensor],
    measured: float,
) -> dict[str, Any]:
    """The configuration of a controller's run; `measured`: the share of the parameters whose noise is measured."""
    device = trained[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return {
        "rule": repr(rule),
        **{name: getattr(rule, name, None) for name in ("estimator", "smoothing", "decays")},
        "noise_factor": noise_factor,
        "optimizer": ", ".join(type(optimizer).__name__ for optimizer in optimizers),
        "param_groups": [_hyperparameters(group) for optimizer in optimizers for group in optimizer.param_groups],
        "total": total,
        **vars(batch),
        "ranks": ranks,
        "device": name,
        "parameters": sum(p.numel() for p in trained),
        "measured_share": measured,
    }


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def _commit() -> str | None:
    try:
        command = ["git", "rev-parse", "--verify", "HEAD"]
        git = subprocess.run(command, capture_output=True, timeout=5, check=False, text=True)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return git.stdout.strip() if git.returncode == 0 else None
