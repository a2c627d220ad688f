"""Averages on the CPU of weights on a GPU: the weights are copied at once, the averages moved when that is over."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch._ema.lerp import Lerp


class Offload:
    """A `Lerp` whose sources are on another device than the averages.

    A call queues copies to pinned memory and returns; the averages move at the next call or `wait()`, when the copies
    are long done. They are queued on the stream that the training runs on, so that whatever writes the weights next (an
    optimizer, a clamp, a replayed graph) comes after them.

    Args:
        sources: the weights.
        averages: for each decay, the averages on the CPU.
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
        """Begin to move the averages towards the weights as they are now."""
        self.wait()
        for source, staged in zip(self._sources, self._staged, strict=True):
            staged.copy_(source, non_blocking=source.is_cuda)
        self._copied = [torch.cuda.current_stream(device).record_event() for device in self._devices]
        self._weights = list(weights)

    def wait(self) -> None:
        """Until the averages have moved."""
        weights, self._weights = self._weights, None
        if weights is not None:
            for copied in self._copied:
                copied.synchronize()
            self._lerp(weights)
