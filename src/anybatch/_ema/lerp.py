"""Moving averages of lists of tensors, in one pass over the memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

# Tensors that are widened, or read for several averages, are processed in pieces that stay in the cache between uses.
# 4 MB of float32 on a CPU: smaller pieces cost more in calls (measured). On a GPU each piece costs a launch.
_PIECE_CPU = 1 << 20
_PIECE_GPU = 1 << 24


@dataclass(frozen=True)
class _Group:
    """Pieces of one device and type that are updated together."""

    sources: list[Tensor]
    wide: list[Tensor]  # buffers of the averages' type; the sources themselves if they have that type
    averages: list[list[Tensor]]  # for each decay


class Lerp:
    """`average <- average + weight * (source - average)` for lists of tensors, with several averages of each source.

    Args:
        sources: The source tensors. They are referenced, not copied.
        averages: For each decay, one average for each source, with its device and shape.
    """

    def __init__(self, sources: Sequence[Tensor], averages: Sequence[Sequence[Tensor]]) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        pieces = [_Piece(*each) for each in zip(sources, zip(*averages, strict=True), strict=True)]
        pieces.sort(key=lambda piece: str(piece.kind))
        self._groups = [
            self._group(cut) for _, alike in groupby(pieces, key=lambda p: p.kind) for cut in _cuts(list(alike))
        ]

    @torch.no_grad()
    def __call__(self, weights: Sequence[float]) -> None:
        """Update the averages with one weight for each decay."""
        for group in self._groups:
            if group.wide is not group.sources:
                torch._foreach_copy_(group.wide, group.sources)
            for averages, weight in zip(group.averages, weights, strict=True):
                torch._foreach_lerp_(averages, group.wide, weight)

    def _group(self, pieces: list["_Piece"]) -> _Group:
        sources = [piece.source for piece in pieces]
        averages = [list(each) for each in zip(*(piece.averages for piece in pieces), strict=True)]
        if not pieces[0].narrow:
            return _Group(sources, sources, averages)
        first, sizes = pieces[0].averages[0], [source.numel() for source in sources]
        key, total = (first.device, first.dtype), sum(sizes)
        if key not in self._buffers or self._buffers[key].numel() < total:
            size = max(total, _piece_size(first.device))
            self._buffers[key] = torch.empty(size, dtype=first.dtype, device=first.device)
        parts = self._buffers[key][:total].split(sizes)
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
        """Yield pieces of at most `size` elements if source and averages have the same dense layout, else the whole."""
        source, averages = self.source.detach(), self.averages
        if not _dense(source) or any(average.stride() != source.stride() for average in averages):
            yield _Piece(source, averages)
            return
        flat = [t.as_strided((t.numel(),), (1,)).split(size) for t in (source, *averages)]
        for first, *rest in zip(*flat, strict=True):
            yield _Piece(first, tuple(rest))


def _cuts(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Yield pieces of one kind in groups of about the cache's size where a source is used more than once."""
    if not pieces[0].narrow and len(pieces[0].averages) == 1:
        yield pieces
        return
    size = _piece_size(pieces[0].source.device)
    group: list[_Piece] = []
    filled = 0
    for part in (part for piece in pieces for part in piece.cut(size)):
        if group and filled + part.source.numel() > size:
            yield group
            group, filled = [], 0
        group.append(part)
        filled += part.source.numel()
    yield group


def _piece_size(device: torch.device) -> int:
    return _PIECE_CPU if device.type == "cpu" else _PIECE_GPU


def _dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one interval of memory, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
