"""The Euclidean norms of a window.

[Note: queue] For a small tensor the call of a norm takes ten times as long as its entries. Small gradients are queued
until the end of the backward and measured together. The queue holds the gradients passed to the hooks, never `.grad`:
autograd adds to `.grad` in place, DDP and FSDP2 write averages into it, and the user may change it. Autograd does not
write to a gradient with another reference. The cost: autograd copies the first gradient of a window into `.grad`. A
large gradient is measured at once, while it is in the cache; the norms of its rows are queued.

A hook or a custom backward that writes into its gradient breaks PyTorch's rules. It may change a queued tensor where an
addition gave the same tensor to both. The tensor's version shows the write. Such a window is not measured, and from
then on nothing is queued.

[Note: streams] A hook runs on the stream of its parameter's forward, the end of a backward on the caller's, after all
others. A tensor of the queue is then read on a stream other than its own. CUDA's allocator must know of it before the
tensor is freed, or its memory is given away while the read is pending.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch._gradients.autograd import record_readers, stream_of
from anybatch._gradients.norms import SMALL, condensed, part_of, summed, total_squared_norm
from anybatch._gradients.parameters import entries_of
from anybatch._gradients.probe import Placement, Probe
from anybatch._gradients.window import Norms

# Bytes of small gradients in the queue at most: 256 of the largest in float32, more than most networks have. Gradients
# of further parameters are measured one by one.
_ROOM = 1 << 24


class Queue:
    """Gradients of parameters with the same number of copies; see the note above."""

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []  # hooks append to these two, so neither is ever replaced
        self.versions: list[int] = []
        self.rows: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.streams: set[tuple[torch.device, int]] = set()  # of the hooks, on devices

    def take(self, grad: Tensor) -> None:
        """Measure a gradient that may not be queued."""
        if grad.numel() >= SMALL:
            self.rows.extend(condensed(grad))
        else:
            self.squares.append(total_squared_norm([grad]))

    def measure(self) -> bool:
        """Measure the queued gradients; false if something wrote to one of them."""
        unchanged = self.versions == [grad._version for grad in self.waiting]
        record_readers([*self.waiting, *self.rows], self.streams)
        if self.waiting or self.rows:
            self.squares.append(total_squared_norm([*self.waiting, *self.rows]))
            self.drop()
        return unchanged

    def drop(self) -> None:
        """Empty the queue."""
        self.waiting.clear()
        self.versions.clear()
        self.rows.clear()
        self.streams.clear()


class EuclideanNorms(Probe):
    """The squared norms of all parameters together."""

    name = "euclidean"

    def __init__(self) -> None:
        self.patient = True  # whether gradients may be queued at all
        self.drop()

    def drop(self) -> None:
        """Drop all parameters."""
        self.queues: list[Queue] = []  # the queue of each parameter
        self.queued: list[bool] = []  # for each parameter, whether its dense gradients are queued
        self._by_copies: dict[float, Queue] = {}
        self._mean_copies: list[float] = []
        self._room = _ROOM
        self.clear()

    def follow(self, parameters: Sequence[Tensor], places: Sequence[Placement]) -> None:  # noqa: ARG002
        """Measure these parameters as well."""
        for place in places:
            entries = entries_of(place.leaf)
            size = entries * place.leaf.element_size()
            queued = entries < SMALL and size <= self._room
            self._room -= size if queued else 0
            self.queued.append(queued)
            self.queues.append(self._by_copies.setdefault(place.sample_copies, Queue()))
            self._mean_copies.append(place.mean_copies)

    def open(self, *, sampled: bool) -> bool:
        """Begin a window."""
        self.clear()
        return sampled

    def clear(self) -> None:
        """Drop the norms and the queued gradients."""
        for queue in self._by_copies.values():
            queue.drop()
            queue.squares.clear()
        self.valid = True  # whether no queued gradient of the window was changed
        self._observed: Tensor | None = None
        self._mean: Tensor | None = None

    def holds(self, index: int, grad: Tensor) -> bool:
        """Whether this gradient of parameter `index` is queued until the end of the backward."""
        return self.queued[index] and self.patient and not grad.is_sparse

    def sample(self, row: int, index: int, parameter: Tensor, grad: Tensor, *, held: bool) -> None:  # noqa: ARG002
        """Queue or measure a gradient, as the hooks of `GradientHooks` do inline."""
        queue = self.queues[index]
        if grad.is_cuda:
            queue.streams.add((grad.device, stream_of(grad.device)))
        if held:
            queue.waiting.append(grad)
            queue.versions.append(grad._version)
        else:
            queue.take(grad)

    def samples(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:  # noqa: ARG002
        """Measure all gradients of a window at once."""
        self._observed = total_squared_norm(gradients) / gradients[0].shape[0] ** 2

    def mean(self, parameters: Sequence[Tensor]) -> None:
        """Measure `.grad`."""
        parts = []
        for copies in dict.fromkeys(self._mean_copies):
            mine = zip(parameters, self._mean_copies, strict=True)
            square = total_squared_norm([part_of(p.grad, p) for p, n in mine if n == copies and p.grad is not None])
            parts.append(square if copies == 1 else square / copies)
        self._mean = summed(parts)

    def mean_of(self, tensors: Sequence[Tensor], *, copies: int) -> None:
        """Measure the mean gradient where an engine keeps it in tensors of its own, the same on `copies` ranks."""
        self._mean = total_squared_norm(tensors) / copies

    def forget_mean(self) -> None:
        """Drop the norm of `.grad`."""
        self._mean = None

    def measure(self) -> None:
        """Empty the queues."""
        for queue in self._by_copies.values():
            if not queue.measure():
                self.valid = self.patient = False

    def norms(self, fires: Sequence[int]) -> Norms:  # noqa: ARG002
        """The norms, `[1]`; 0 where no parameter has a gradient."""
        samples = self._observed
        if samples is None:
            parts = []
            for copies, queue in self._by_copies.items():
                if queue.squares:
                    square = summed(queue.squares)
                    parts.append(square if copies == 1 else square / copies)
            samples = summed(parts)
        return Norms(samples[None], None if self._mean is None else self._mean[None])
