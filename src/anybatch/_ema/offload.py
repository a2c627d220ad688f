"""Averages on the CPU of weights on a GPU: asynchronous copies of the weights, then the update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch._ema.lerp import Lerp


class Offload:
    """A `Lerp` whose sources are on another device than the averages.

    A call queues copies to pinned memory and returns. The averages are updated at the next call or at `wait()`, when
    the copies have long finished. The copies are queued on the training's stream. So any later write to the weights
    (an optimizer, a clamp, a replayed graph) comes after the copies.
    """

    def __init__(self, sources: Sequence[Tensor], averages: Sequence[Sequence[Tensor]]) -> None:
        self._staged = [torch.empty_like(s, device="cpu", pin_memory=s.is_cuda, requires_grad=False) for s in sources]
        self._lerp = Lerp(self._staged, averages)
        self._sources = list(sources)
        self._devices = {s.device for s in sources if s.is_cuda}
        self._copied: list[torch.cuda.Event] = []
        self._weights: list[float] | None = None

    @torch.no_grad()
    def __call__(self, weights: Sequence[float]) -> None:
        """Start an update of the averages with the current values of the sources."""
        self.wait()
        for source, staged in zip(self._sources, self._staged, strict=True):
            staged.copy_(source, non_blocking=source.is_cuda)
        self._copied = [torch.cuda.current_stream(device).record_event() for device in self._devices]
        self._weights = list(weights)

    def wait(self) -> None:
        """Finish the pending update."""
        weights, self._weights = self._weights, None
        if weights is not None:
            for copied in self._copied:
                copied.synchronize()
            self._lerp(weights)
