"""The state of the autograd engine, and callbacks at the end of its run."""

import sys
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from anybatch._errors import UnsupportedError, UsageError

# Length of the chain of callbacks. DDP queues a callback during the backward, and with a static graph another one from
# it. A callback queued from a callback runs after those already queued, so the third in a chain runs after both.
LAST = 3


def at_end(callback: Callable[[], None], *, chain: int = 1) -> None:
    """Run `callback` at the end of this engine run, after the callbacks that others queued."""
    later = callback if chain == 1 else lambda: at_end(callback, chain=chain - 1)
    Variable._execution_engine.queue_callback(later)


def check_no_backward() -> None:
    """Raise a `UsageError` if the autograd engine is running in this thread."""
    if torch._C._current_graph_task_id() != -1:
        raise UsageError(
            "optimizer.step() was called during a backward, before the gradients of the step are complete. Call it "
            "after loss.backward(), or pass attach a number as scale and a rule that measures nothing."
        )


def check_not_captured(tensor: Tensor) -> None:
    """Raise an `UnsupportedError` if the device of `tensor` captures a CUDA graph."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "A backward or an optimizer's step is captured into a CUDA graph. A replay runs no Python, so nothing is "
            "measured, and every step has the gain of the capture. Leave both out of the capture; torch.compile of the "
            "model or of optimizer.step is supported."
        )


def stream_of(device: torch.device) -> int:
    """A number for this thread's current stream of a CUDA device; 0 for other devices."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def record_readers(tensors: Iterable[Tensor], streams: Collection[tuple[torch.device, int]]) -> None:
    """Before this thread reads tensors that were made on `streams`: have CUDA's allocator keep them for its own."""
    if any(stream_of(device) != stream for device, stream in streams):
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


def accumulates(leaf: Tensor) -> bool:
    """Whether the engine's run adds to `.grad`; in `torch.autograd.grad`, which does not, the engine raises."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(leaf).node))
    except RuntimeError:
        return False


def inside_a_backward() -> bool:
    """Whether a custom function's backward started the engine, as re-entrant checkpointing does."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
