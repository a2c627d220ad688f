"""Uneven inputs: a rank that has run out of data takes part in the other ranks' reductions.

PyTorch's generic `Join` context does this for everything that is `Joinable`. On a rank that has run out, each iteration
of the others calls the hooks in their order: DDP's, which matches its reductions, then this one, which matches ours.
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
    """What a controller does in `torch.distributed.algorithms.Join([model, controller])`, beside a model under DDP.

    Args:
        engine: the engine that averages the gradients.
        sizes: the sizes of the probes' norms, as the reduction has them; `None` where steps have no reduction.
        refused: what else the controller was given that `Join` cannot be combined with; empty for nothing.
    """

    def __init__(self, engine: Engine, *, sizes: Mapping[str, int] | None, refused: str) -> None:
        self._ddp = engine.ddp
        self._ranks = engine.ranks
        self._sizes = sizes
        self._refused = refused

    def hook(
        self,
        *,
        followed: bool,
        state: Callable[[], Mapping[str, float]],
        adopt: Callable[[Mapping[str, float]], None],
    ) -> JoinHook:
        """What `Join` calls on a rank that has run out of data; the model must come first in its list.

        Args:
            followed: whether something beside the schedule follows the clock.
            state: gives this rank's state, all numbers.
            adopt: takes another rank's state.

        Raises:
            UnsupportedError: no DDP; a setting that cannot be combined with `Join`; something that follows the clock.
        """
        if self._ddp is None or self._refused:
            raise UnsupportedError(
                "Join needs a model under DistributedDataParallel"
                + (f", and works without {self._refused}: " if self._refused else ": ")
                + "a rank that has run out of data must take part in every step of the others."
            )
        if followed:
            raise UnsupportedError(
                "Something beside the schedule follows the clock: a ModelEMA, a BatchController or a progress bar. At "
                "the end of Join a rank that has run out takes the clock of the others, and what follows its own clock "
                "would miss their steps. Train without Join on inputs of equal length, or stop() it before Join."
            )
        return _JoinHook(self._ddp, step=self._reduce, adopt=lambda last: self._adopt_from_last(last, state, adopt))

    @property
    def device(self) -> torch.device:
        """DDP's."""
        return torch.device("cpu") if self._ddp is None else self._ddp.join_device

    @property
    def process_group(self) -> Any:
        """DDP's."""
        return self._ranks.group

    def share(self, *, joined: bool) -> Share | None:
        """How DDP divides the gradients of fewer ranks; `None` outside of `Join`."""
        if self._ddp is None or not joined:
            return None
        return "all" if self._ddp._divide_by_initial_world_size else "active"

    def _reduce(self) -> None:
        if self._sizes is not None:
            join_reduction(self._sizes, self._ranks)

    def _adopt_from_last(
        self,
        is_last: bool,
        state: Callable[[], Mapping[str, float]],
        adopt: Callable[[Mapping[str, float]], None],
    ) -> None:
        """Take the clock and the averages of the rank that took the most steps."""
        mine, group = state(), self._ranks.group
        numbers = torch.tensor(list(mine.values()), dtype=torch.float64, device=self.device)
        source = torch.tensor(dist.get_rank() if is_last else -1, device=self.device)
        dist.all_reduce(source, op=dist.ReduceOp.MAX, group=group)
        dist.broadcast(numbers, src=int(source), group=group)
        adopt(dict(zip(mine, numbers.tolist(), strict=True)))


class _JoinHook(JoinHook):
    """What a rank that has run out of data does for the steps of the others.

    Args:
        ddp: the model; its own hook runs before this one and leaves in `require_forward_param_sync` whether the others
            synchronise, and so step, in this iteration.
        step: takes part in the reduction of a step with nothing to add.
        adopt: takes the state of the rank that finished last; called on every rank, with whether it is this one.
    """

    def __init__(
        self, ddp: DistributedDataParallel, *, step: Callable[[], None], adopt: Callable[[bool], None]
    ) -> None:
        self._ddp = ddp
        self._step = step
        self._adopt = adopt

    def main_hook(self) -> None:
        """Match one iteration of the ranks that go on."""
        if self._ddp.require_forward_param_sync:
            self._step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """All ranks are done: go on from the same clock and averages."""
        self._adopt(is_last_joiner)
