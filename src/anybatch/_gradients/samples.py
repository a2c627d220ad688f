"""Samples: the squared norms of a window's micro-batches.

[Note: waiting] A norm of its own costs a small tensor ten times what its entries do, so small gradients wait for the
end of the backward and are measured together. What waits is the gradient that a hook got, not `.grad`: autograd adds
to `.grad` in place, DDP and FSDP2 write averages into it or take it away, and the user may do what he likes with it,
while autograd writes to no tensor that somebody else holds. The price is that the first gradient of a window, which
would have become `.grad`, is copied. A large one is measured at once, while the cache has it; its rows' norms wait.

A hook or a custom backward that changes its gradient in place, against PyTorch's rules, may change one that waits,
where an addition passed it on to both. That shows in its version: the window is not measured, and from then on nothing
waits.
"""

import torch
from torch import Tensor

from anybatch._gradients.norms import SMALL, condensed, total_squared_norm

# Bytes of small gradients that may wait: 256 of the largest in float32, more than most networks have. The gradients of
# further parameters are measured one by one.
_ROOM = 1 << 24


class Samples:
    """One window: each gradient is put into `waiting`, with its version into `versions`, or given to `take`; `measure`
    at a backward's end.
    """

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []  # these two are the same lists for good: hooks append to them
        self.versions: list[int] = []
        self.squares: list[Tensor] = []
        self.valid = True  # whether none of the window was written to while it waited
        self.patient = True  # whether gradients may wait at all
        self._rows: list[Tensor] = []
        self._room = _ROOM

    def admits(self, leaf: Tensor) -> bool:
        """Whether the gradients of `leaf` may wait, dense ones; to be asked once for each."""
        size = leaf.numel() * leaf.element_size()
        if leaf.numel() >= SMALL or size > self._room:
            return False
        self._room -= size
        return True

    def wait(self, grad: Tensor) -> None:
        """A gradient that may; the hook does the same in place."""
        self.waiting.append(grad)
        self.versions.append(grad._version)

    def take(self, grad: Tensor) -> None:
        """A gradient that may not wait."""
        if grad.numel() >= SMALL:
            self._rows.extend(condensed(grad))
        else:
            self.squares.append(total_squared_norm([grad]))

    def measure(self) -> None:
        """Nothing waits any longer."""
        if self.versions != [grad._version for grad in self.waiting]:
            self.valid = self.patient = False
        if self.waiting or self._rows:
            self.squares.append(total_squared_norm([*self.waiting, *self._rows]))
            self._forget()

    def total(self) -> Tensor:
        """The sum of the squared norms of all gradients of the window."""
        if not self.squares:  # no parameter has an entry
            return torch.zeros((), dtype=torch.float64)
        return torch.stack([square.to(self.squares[0].device) for square in self.squares]).sum()

    def clear(self) -> None:
        """A new window."""
        self._forget()
        self.squares.clear()
        self.valid = True

    def _forget(self) -> None:
        self.waiting.clear()
        self.versions.clear()
        self._rows.clear()
