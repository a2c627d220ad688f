"""The loops of `benchmarks.overhead`: the plain one, this library, and others that measure the same."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import anybatch

Step = Callable[[], None]


class MissingError(Exception):
    """A library is not installed, or does not load."""


@dataclass(frozen=True)
class Loop:
    """What a training loop calls.

    Args:
        syncs: is told before each backward whether it is the window's last.
    """

    step: Callable[[], object]
    zero_grad: Callable[[], object]
    syncs: Callable[[bool], None] = lambda _: None


def plain(_: nn.Module, optimizer: Optimizer, __: int) -> Loop:
    return Loop(optimizer.step, optimizer.zero_grad)


def ours(**options: Any) -> Callable[..., Loop]:
    def loop(model: nn.Module, optimizer: Optimizer, accumulation: int) -> Loop:
        anybatch.attach(optimizer, model=model, scale="count", total=1e6, **options)
        return plain(model, optimizer, accumulation)

    return loop


@cache
def _fairscale() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fairscale.optim import AdaScale
    except Exception as error:
        raise MissingError(f"{type(error).__name__}: {error}") from error
    return AdaScale


def fairscale(_: nn.Module, optimizer: Optimizer, accumulation: int) -> Loop:
    scaled = _fairscale()(optimizer, num_gradients_to_accumulate=accumulation)
    return Loop(scaled.step, scaled.zero_grad)


@cache
def _adaptdl() -> Any:
    """The module alone: the package around it starts a scheduler's client, with dependencies of its own."""
    try:
        found = importlib.util.find_spec("adaptdl")
        if found is None or found.origin is None:
            raise ImportError("No module named 'adaptdl'")
        spec = importlib.util.spec_from_file_location(
            "adaptdl_noise", Path(found.origin).parent / "torch" / "gradient_noise_scale.py"
        )
        if spec is None or spec.loader is None:
            raise ImportError("adaptdl without torch/gradient_noise_scale.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise MissingError(f"{type(error).__name__}: {error}") from error
    return module


def adaptdl(_: nn.Module, optimizer: Optimizer, accumulation: int) -> Loop:
    """Its noise scale, which knows Adam's metric and uses it there."""
    module, adp = _adaptdl(), SimpleNamespace(require_backward_grad_sync=True)
    kind = module.AdamGradientNoiseScale if "betas" in optimizer.defaults else module.GradientNoiseScale
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    noise = kind(adp, optimizer, num_replicas=ranks)

    def step() -> None:
        noise.gain(accumulation * ranks)
        optimizer.step()

    return Loop(step, noise.reset_accumulation, lambda last: setattr(adp, "require_backward_grad_sync", last))


RIVALS: dict[str, Callable[[], Any]] = {"fairscale": _fairscale, "adaptdl": _adaptdl}
LOOPS: dict[str, Callable[..., Loop]] = {
    "plain": plain,
    "plain again": plain,
    "anybatch": ours(rule=anybatch.AdaScale()),
    "Linear, counting": ours(rule=anybatch.Linear()),
    "fairscale": fairscale,
    "adaptdl": adaptdl,
}
