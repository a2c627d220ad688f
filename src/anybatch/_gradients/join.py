"""Uneven inputs: a rank that has run out of data takes part in the other ranks' reductions.

PyTorch's generic `Join` context does this for everything that is `Joinable`. On a rank that is done, each iteration of
the others calls the hooks in their order: DDP's, which matches its reductions, then this one, which matches ours.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from anybatch._errors import UnsupportedError
from anybatch._gradients.reduce import Ranks, Share, shadow


class Companion(Joinable):
    """Takes part in `torch.distributed.algorithms.Join([model, controller])` beside a model under DDP; a controller
    is one.

    Args:
        ddp: the model; `None` where it is not under DDP.
        ranks: whose gradients are averaged.
        counted: whether steps have a reduction of ours.
        foreseen: whether a rank that is done can know which steps the others take.
        weighed: whether the reduction has the norms in Adam's metric too.
    """

    def __init__(
        self, ddp: DistributedDataParallel | None, *, ranks: Ranks, counted: bool, foreseen: bool, weighed: bool
    ) -> None:
        super().__init__()
        self._ddp = ddp
        self._ranks = ranks
        self._counted = counted
        self._foreseen = foreseen
        self._weighed = weighed

    @abstractmethod
    def state_dict(self) -> dict[str, float | int]:
        """The state, all numbers."""

    @property
    @abstractmethod
    def _followed(self) -> bool:
        """Whether something beside the schedule follows the clock."""

    @abstractmethod
    def _go_on(self, values: Mapping[str, float]) -> None:
        """Take another rank's state."""

    def join_hook(self, **_: Any) -> JoinHook:
        """What `Join` calls on a rank that has run out of data; the model must come first in its list.

        Raises:
            UnsupportedError: no DDP, a lagged step, a `GradScaler`, layers that are looked at, or something that
                follows the clock.
        """
        if self._ddp is None or not self._foreseen:
            raise UnsupportedError(
                "Join needs a model under DistributedDataParallel, and neither lagged=True nor a grad_scaler nor "
                "per_layer: the ranks that are done must know which steps the others take."
            )
        if self._followed:
            raise UnsupportedError(
                "Under Join a rank that is done takes the clock of the others at the end, and what follows its own "
                "clock, a ModelEMA, a BatchController or a progress bar, would miss their steps and differ over the "
                "ranks. Train without Join, on inputs of equal length, or stop() what follows before Join."
            )
        return _ShadowHook(
            self._ddp,
            shadow=lambda: shadow(self._ranks, weighed=self._weighed) if self._counted else None,
            adopt=self._adopt_from_last,
        )

    @property
    def join_device(self) -> torch.device:
        """DDP's."""
        return torch.device("cpu") if self._ddp is None else self._ddp.join_device

    @property
    def join_process_group(self) -> Any:
        """DDP's."""
        return self._ranks.group

    def _share(self) -> Share | None:
        """How DDP divides the gradients of fewer ranks."""
        if self._ddp is None or not self._join_config.enable:
            return None
        return "all" if self._ddp._divide_by_initial_world_size else "active"

    def _adopt_from_last(self, is_last: bool) -> None:
        """Take the clock and the averages of the rank that took the most steps."""
        state, group = self.state_dict(), self._ranks.group
        numbers = torch.tensor(list(state.values()), dtype=torch.float64, device=self.join_device)
        source = torch.tensor(dist.get_rank() if is_last else -1, device=self.join_device)
        dist.all_reduce(source, op=dist.ReduceOp.MAX, group=group)
        dist.broadcast(numbers, src=int(source), group=group)
        self._go_on(dict(zip(state, numbers.tolist(), strict=True)))


class _ShadowHook(JoinHook):
    """What a finished rank does for the steps of the others.

    Args:
        ddp: the model; its own hook runs before this one and leaves in `require_forward_param_sync` whether the others
            synchronise, and so step, in this iteration.
        shadow: takes part in the reduction of a step with nothing to add.
        adopt: takes the state of the rank that finished last; called on every rank, with whether it is this one.
    """

    def __init__(
        self, ddp: DistributedDataParallel, *, shadow: Callable[[], None], adopt: Callable[[bool], None]
    ) -> None:
        self._ddp = ddp
        self._shadow = shadow
        self._adopt = adopt

    def main_hook(self) -> None:
        """Match one iteration of the ranks that go on."""
        if self._ddp.require_forward_param_sync:
            self._shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        """All ranks are done: go on from the same clock and averages."""
        self._adopt(is_last_joiner)
