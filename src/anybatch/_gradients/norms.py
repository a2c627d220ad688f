"""Squared norms of gradients, combined in float64.

Variances here are differences of squared norms that may agree in six digits, so a norm in float32 must not lose
any. A float32 reduction over a long flat CPU tensor does: off by 2e-4 at 8 million elements, 1 % at 67 million.
Norms of rows of 512, combined in float64, are right to 2e-9 at 1.05 times the cost; below 16384 elements the conversion
of the whole tensor to float64 is cheaper still.

Of many small tensors the time is in the calls, 3 us for a norm of its own against 0.6 us for a place in a flat copy: so
they are copied together, block by block, and a block takes one product in float64.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_ROW = 512  # not a power of 4: entries of equal size would put the rows' norms on a binade's edge, 4e-8 off
SMALL = 16384
# Entries of a block. On a CPU its copies, 384 KB, stay in a core's cache: at 131072 an entry takes twice as long.
# Elsewhere the number of kernels counts, and these are 16 MB of float32.
_BLOCK_CPU, _BLOCK = 1 << 15, 1 << 22


def norm_into(out: Tensor, tensor: Tensor) -> None:
    """Write the Euclidean norm of `tensor` (not squared) into `out`, a float64 tensor of shape `[]`.

    One dispatched operation for a small tensor, two to four for a large one; no memory of the tensor's size.
    """
    tensor = real_of(tensor)
    if tensor.numel() >= SMALL:
        tensor = torch.cat(_row_norms(tensor))
    torch.linalg.vector_norm(tensor, dtype=torch.float64, out=out)


@torch.no_grad()
def total_squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squared norms of `tensors`: a float64 tensor of shape `[]` on the first tensor's device."""
    small: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() >= SMALL or tensor.is_sparse or tensor.is_complex():
            small.extend(condensed(tensor))
        else:
            small.append(tensor)
    devices = dict.fromkeys([tensor.device for tensor in small])
    squares: list[Tensor] = []
    for device in devices:
        mine = small if len(devices) == 1 else [tensor for tensor in small if tensor.device == device]
        squares.extend(map(_squared_norm, _blocks(mine, _BLOCK_CPU if device.type == "cpu" else _BLOCK)))
    if len(squares) <= 1:
        return squares[0] if squares else torch.zeros((), dtype=torch.float64)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum()


def condensed(tensor: Tensor) -> list[Tensor]:
    """Small real tensors with the same squared norm in all; none shares the memory of a large `tensor`."""
    tensor = real_of(tensor)
    if tensor.numel() < SMALL:
        return [tensor]
    return _row_norms(tensor)


def real_of(tensor: Tensor) -> Tensor:
    """A strided, real tensor with the same entries and no graph; the tensor itself where it is one already."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor


def local_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or a DTensor's shard on this rank."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def part_of(grad: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, laid out as its parameter: the tensor itself, or a DTensor's shard.

    Under tensor parallelism a gradient may have another layout, such as a partial sum for a norm's weights under
    SequenceParallel. It is redistributed first, a collective of the gradient's size.
    """
    placements = getattr(parameter, "placements", None)
    if placements is not None and getattr(grad, "placements", placements) != placements:
        grad = cast("DTensor", grad).redistribute(placements=placements)
    return local_of(grad)


def _blocks(tensors: Sequence[Tensor], least: int) -> Iterator[list[Tensor]]:
    """`tensors` in order, in lists of at least so many entries."""
    block: list[Tensor] = []
    entries = 0
    for tensor in tensors:
        block.append(tensor)
        entries += tensor.numel()
        if entries >= least:
            yield block
            block, entries = [], 0
    if block:
        yield block


def _squared_norm(block: list[Tensor]) -> Tensor:
    flat = torch._C._nn.flatten_dense_tensors(block).double()
    return torch.dot(flat, flat)


def _row_norms(tensor: Tensor) -> list[Tensor]:
    """Norms of rows of 512 entries of `tensor`, and of what is left, at least in float32."""
    if tensor.dim() == 4 and not tensor.is_contiguous():  # channels-last: the order of entries is free, so no copy
        tensor = tensor.permute(0, 2, 3, 1)
    flat = tensor.reshape(-1)
    dtype = torch.float32 if flat.dtype.itemsize < 4 else None
    whole = flat.numel() - flat.numel() % _ROW
    norms = [torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=dtype)]
    if whole < flat.numel():
        norms.append(torch.linalg.vector_norm(flat[whole:], dim=0, keepdim=True, dtype=dtype))
    return norms
