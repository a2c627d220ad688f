"""Uneven inputs: a rank that has run out of data takes part in the other ranks' reductions.

PyTorch's generic `Join` context does this for everything that is `Joinable`. On a rank that is done, each iteration of
the others calls the hooks in their order: DDP's, which matches its reductions, then this one, which matches ours.
"""

from collections.abc import Callable

from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel


class ShadowHook(JoinHook):
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
