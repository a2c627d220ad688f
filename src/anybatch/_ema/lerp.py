"""Moving averages towards tensors: what can be prepared is prepared once, the rest is one pass over the memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

# Where tensors are widened, or read for several averages, they are taken in pieces that stay in a cache between their
# uses: 4 MB of float32 on a CPU (measured: smaller ones cost more in calls). On a GPU a piece costs a launch.
_PIECE_CPU = 1 << 20
_PIECE_GPU = 1 << 24


@dataclass(frozen=True)
class _Group:
    """Pieces that are moved together: same device, same type.

    Args:
        sources: pieces of the tensors to move towards.
        wide: for each, the scratch in which it has its average's type; the sources themselves if they have it already.
        averages: for each decay, the pieces of its averages.
    """

    sources: list[Tensor]
    wide: list[Tensor]
    averages: list[list[Tensor]]


class Lerp:
    """`average <- average + weight * (source - average)` for lists of tensors, and for several averages of each source.

    Args:
        sources: the tensors to move towards; they are held, so that what is written to them is seen.
        averages: for each decay, one average for each source, on its device and of its shape.
    """

    def __init__(self, sources: Sequence[Tensor], averages: Sequence[Sequence[Tensor]]) -> None:
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        pieces = [_Piece(*each) for each in zip(sources, zip(*averages, strict=True), strict=True)]
        pieces.sort(key=lambda piece: str(piece.kind))
        self._groups = [
            self._prepared(cut) for _, alike in groupby(pieces, key=lambda p: p.kind) for cut in _cuts(list(alike))
        ]

    @torch.no_grad()
    def __call__(self, weights: Sequence[float]) -> None:
        """Move; `weights` has one for each decay."""
        for group in self._groups:
            if group.wide is not group.sources:
                torch._foreach_copy_(group.wide, group.sources)
            for averages, weight in zip(group.averages, weights, strict=True):
                torch._foreach_lerp_(averages, group.wide, weight)

    def _prepared(self, pieces: list["_Piece"]) -> _Group:
        sources = [piece.source for piece in pieces]
        averages = [list(each) for each in zip(*(piece.averages for piece in pieces), strict=True)]
        if not pieces[0].narrow:
            return _Group(sources, sources, averages)
        first = pieces[0].averages[0]
        total = sum(source.numel() for source in sources)
        key = (first.device, first.dtype)
        if key not in self._scratch or self._scratch[key].numel() < total:
            self._scratch[key] = torch.empty(max(total, _piece(first.device)), dtype=first.dtype, device=first.device)
        parts = self._scratch[key][:total].split([source.numel() for source in sources])
        return _Group(sources, [part.view(s.shape) for part, s in zip(parts, sources, strict=True)], averages)


@dataclass(frozen=True)
class _Piece:
    source: Tensor
    averages: tuple[Tensor, ...]

    @property
    def narrow(self) -> bool:
        return self.source.dtype != self.averages[0].dtype

    @property
    def kind(self) -> tuple[torch.device, torch.dtype, torch.dtype]:
        return self.source.device, self.source.dtype, self.averages[0].dtype

    def cut(self, size: int) -> Iterator["_Piece"]:
        """In pieces of at most `size` elements, if source and averages lie in memory alike and without gaps."""
        source, averages = self.source.detach(), self.averages
        alike = all(average.stride() == source.stride() for average in averages)
        if not alike or not _dense(source):
            yield _Piece(source, averages)
            return
        flat = [t.as_strided((t.numel(),), (1,)).split(size) for t in (source, *averages)]
        for first, *rest in zip(*flat, strict=True):
            yield _Piece(first, tuple(rest))


def _cuts(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of one kind, in groups of about a cache's size where a source is used more than once."""
    if not pieces[0].narrow and len(pieces[0].averages) == 1:
        yield pieces
        return
    size = _piece(pieces[0].source.device)
    group: list[_Piece] = []
    filled = 0
    for piece in pieces:
        for part in piece.cut(size):
            if group and filled + part.source.numel() > size:
                yield group
                group, filled = [], 0
            group.append(part)
            filled += part.source.numel()
    yield group


def _piece(device: torch.device) -> int:
    return _PIECE_CPU if device.type == "cpu" else _PIECE_GPU


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
