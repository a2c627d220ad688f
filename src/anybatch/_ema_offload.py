"""Averages on the CPU of weights on a GPU: copied on a stream of its own, averaged in a thread of its own."""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from anybatch._ema_lerp import Lerp


class Offload:
    """A `Lerp` whose sources are on another device than the averages.

    A call returns as soon as the copies to pinned memory are queued on a side stream; a thread waits for them and moves
    the averages. Meanwhile the next forward and backward run, which only read the weights. What writes them, the next
    optimizer step, is made to wait for the copies (on the device, not on the host) by a hook on every optimizer. Where
    there is no CUDA the copy is finished before the call returns.

    Args:
        sources: the weights.
        averages: for each decay, the averages on the CPU.
    """

    def __init__(self, sources: Sequence[Tensor], averages: Sequence[Sequence[Tensor]]) -> None:
        self._staged = [torch.empty_like(s, device="cpu", pin_memory=s.is_cuda, requires_grad=False) for s in sources]
        self._lerp = Lerp(self._staged, averages)
        self._sources = list(sources)
        self._streams = {d: torch.cuda.Stream(d) for d in {s.device for s in sources} if d.type == "cuda"}
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="anybatch-ema")
        self._running: Future[None] | None = None
        handle = register_optimizer_step_pre_hook(_forgetting(self))
        self._end = weakref.finalize(self, handle.remove)

    @torch.no_grad()
    def __call__(self, weights: Sequence[float]) -> None:
        """Begin to move the averages towards the weights as they are now."""
        self.wait()
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for source, staged in zip(self._sources, self._staged, strict=True):
            side = self._streams.get(source.device)
            if side is None:
                staged.copy_(source)
                continue
            with torch.cuda.stream(side):
                staged.copy_(source, non_blocking=True)
            source.detach().record_stream(side)
        self._copied = {device: stream.record_event() for device, stream in self._streams.items()}
        self._running = self._thread.submit(self._move, list(self._copied.values()), list(weights))

    def wait(self) -> None:
        """Until the averages have moved; raises what went wrong on the way."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread and the hook."""
        self.wait()
        self._end()
        self._thread.shutdown()

    def before_step(self) -> None:
        """Make the streams that will write the weights wait until they have been copied."""
        for device, copied in self._copied.items():
            torch.cuda.current_stream(device).wait_event(copied)
        self._copied = {}

    def _move(self, copied: Sequence[Any], weights: Sequence[float]) -> None:
        for event in copied:
            event.synchronize()
        self._lerp(weights)


def _forgetting(offload: Offload) -> Any:
    """The hook; it does not keep `offload`, and torch.compile does not trace it."""
    weak = weakref.ref(offload)

    def hook(*_: Any) -> None:
        alive = weak()
        if alive is not None:
            alive.before_step()

    return torch.compiler.disable(hook)
