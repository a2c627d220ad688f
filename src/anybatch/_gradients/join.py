"""Uneven inputs: a rank that has run out of data takes part in the other ranks' reductions.

PyTorch's generic `Join` context does this for each `Joinable`. On a rank that has run out of data, each iteration of
the others calls the hooks in their order: DDP's, which matches its reductions, then this one, which matches ours.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import UnsupportedError
from anybatch._gradients.engine import Engine
from anybatch._gradients.reduce import Share, join_reduction


class JoinSupport:
    """The controller's part in `torch.distributed.algorithms.Join([model, controller])`.

    `sizes` are those of the probes' norms; `None` where steps have no reduction. `refused` names the settings that
    `Join` does not support.
    """

    def __init__(self, engine: Engine, *, sizes: Mapping[str, int] | None, refused: str) -> None:
        self._ddp = engine.ddp
        self._ranks = engine.ranks
        self._sizes = sizes
        self._refused = refused

    def hook(
        self, *, followed: bool, state: Callable[[], Mapping[str, float]], adopt: Callable[[Mapping[str, float]], None]
    ) -> JoinHook:
        """The hook for a rank that has run out of data; the model must be first in the list of `Join`.

        `followed` is whether something beside the schedule follows the clock. `state` gives this rank's state, and
        `adopt` takes another rank's.

        Raises:
            UnsupportedError: no DDP; a setting that `Join` does not support; something that follows the clock.
        """
        if self._ddp is None or self._refused:
            raise UnsupportedError(
                "Join needs a model under DistributedDataParallel"
                + (f", and does not support {self._refused}: " if self._refused else ": ")
                + "a rank that has run out of data must take part in every step of the others."
            )
        if followed:
            raise UnsupportedError(
                "Something beside the schedule follows the clock: a ModelEMA, a BatchController or a progress bar. At "
                "the end of Join a rank that has run out of data takes the clock of the others, and a subscriber of "
                "its own clock misses their steps. Train without Join on inputs of equal length, or stop() it before "
                "Join."
            )
        return _JoinHook(self._ddp, step=self._reduce, end=lambda last: self._adopt_from_last(last, state, adopt))

    @property
    def device(self) -> torch.device:
        """DDP's device."""
        return torch.device("cpu") if self._ddp is None else self._ddp.join_device

    @property
    def process_group(self) -> Any:
        """DDP's process group."""
        return self._ranks.group

    def share(self, *, joined: bool) -> Share | None:
        """The divisor of DDP where ranks have run out of data; `None` outside of `Join`."""
        if self._ddp is None or not joined:
            return None
        return "all" if self._ddp._divide_by_initial_world_size else "active"

    def _reduce(self) -> None:
        if self._sizes is not None:
            join_reduction(self._sizes, self._ranks)

    def _adopt_from_last(
        self, is_last: bool, state: Callable[[], Mapping[str, float]], adopt: Callable[[Mapping[str, float]], None]
    ) -> None:
        """Take the state of the rank that finished last, on every rank."""
        own, group = state(), self._ranks.group
        numbers = torch.tensor(list(own.values()), dtype=torch.float64, device=self.device)
        source = torch.tensor(dist.get_rank() if is_last else -1, device=self.device)
        dist.all_reduce(source, op=dist.ReduceOp.MAX, group=group)
        dist.broadcast(numbers, src=int(source), group=group)
        adopt(dict(zip(own, numbers.tolist(), strict=True)))


class _JoinHook(JoinHook):
    """The part of a rank that has run out of data in the steps of the others, and of every rank at the end."""

    def __init__(self, ddp: DistributedDataParallel, *, step: Callable[[], None], end: Callable[[bool], None]) -> None:
        self._ddp = ddp
        self._step = step
        self._end = end

    def main_hook(self) -> None:
        """Match one iteration of the other ranks."""
        # DDP's hook runs before this one and sets whether the others synchronise, and so step, in this iteration.
        if self._ddp.require_forward_param_sync:
            self._step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Continue from the same clock and averages on all ranks."""
        self._end(is_last_joiner)
