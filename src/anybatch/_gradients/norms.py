"""Squared norms of gradients, combined in float64.

A variance is a difference of squared norms that may agree in six digits, so a norm must not lose any of them. A
float32 reduction over a long flat CPU tensor does: its error is 2e-4 at 8 million elements and 1 % at 67 million.
Norms of rows of 512, combined in float64, are right to 2e-9 at 1.05 times the cost. Below 16384 elements the
conversion of the whole tensor to float64 is cheaper.

For small tensors the calls take the time: 3 us for a norm of each, 0.6 us for a place in a flat copy. So small tensors
are copied into blocks, and each block takes one product in float64.

On a device the number of launches takes the time. More than a few large tensors of one type are one `_foreach_norm`
with a float64 result: its kernels convert each entry and sum in float64, without a copy.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_ROW = 512  # not a power of 4: entries of equal size would put the rows' norms on a binade's edge, 4e-8 off
SMALL = 16384
# Entries of a block. On a CPU its copies, 384 KB, stay in a core's cache: at 131072 entries each takes twice as long.
# Elsewhere the number of kernels matters, and a block is 16 MB of float32.
_BLOCK_CPU, _BLOCK = 1 << 15, 1 << 22
_FEW = 4  # large tensors whose rows take no more launches than `_foreach_norm` with its sum does


def norm_into(out: Tensor, tensor: Tensor) -> None:
    """Write the Euclidean norm of `tensor` (not squared) into `out`, a float64 tensor of shape `[]`.

    A small tensor takes one dispatched operation, a large one two to four, and none takes memory of the tensor's size.
    """
    tensor = real_of(tensor)
    if tensor.numel() >= SMALL:
        tensor = torch.cat(_row_norms(tensor))
    torch.linalg.vector_norm(tensor, dtype=torch.float64, out=out)


@torch.no_grad()
def total_squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squared norms of `tensors`: a float64 tensor of shape `[]` on the first tensor's device."""
    tensors = list(tensors)
    devices = dict.fromkeys([tensor.device for tensor in tensors])
    squares: list[Tensor] = []
    for device in devices:
        here = tensors if len(devices) == 1 else [tensor for tensor in tensors if tensor.device == device]
        squares.extend(_squares_on_host(here) if _on_host(device) else _squares_on_device(here))
    return summed(squares)


def summed(squares: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of shape `[]`, on the first one's device."""
    if len(squares) <= 1:
        return squares[0] if squares else torch.zeros((), dtype=torch.float64)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum()


def condensed(tensor: Tensor) -> list[Tensor]:
    """Small real tensors that together have the squared norm of `tensor`, and share no memory with a large one."""
    tensor = real_of(tensor)
    return [tensor] if tensor.numel() < SMALL else _row_norms(tensor)


def real_of(tensor: Tensor) -> Tensor:
    """A strided, real tensor with the same entries and no graph; `tensor` itself where it has these properties."""
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


def _on_host(device: torch.device) -> bool:
    """Whether a core's cache decides how norms are taken; elsewhere it is the number of launches."""
    return device.type == "cpu"


def _squares_on_host(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    return map(_squared_norm, blocks(_all_small(tensors)))


def _squares_on_device(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Squared norms of tensors of one device by few launches: each is of tensors of one type, or copies them first."""
    small: list[Tensor] = []
    for alike in _by_type(tensors):
        dense = [tensor for tensor in alike if _is_dense(tensor)]
        if sum(tensor.numel() >= SMALL for tensor in dense) <= _FEW:
            small.extend(_all_small(alike))
            continue
        norms = torch.stack(torch._foreach_norm(dense, 2, dtype=torch.float64))
        yield torch.dot(norms, norms)
        small.extend(_all_small([tensor for tensor in alike if not _is_dense(tensor)]))
    for alike in _by_type(small):
        yield from map(_squared_norm, blocks(alike))


def _by_type(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    types: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        types.setdefault(tensor.dtype, []).append(tensor)
    return types.values()


def _is_dense(tensor: Tensor) -> bool:
    """Whether `tensor` is real, and its entries fill one interval of memory."""
    if tensor.is_sparse or tensor.is_complex() or tensor.numel() == 0:
        return False
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _all_small(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Small real tensors with the squared norm of `tensors`."""
    small: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() >= SMALL or tensor.is_sparse or tensor.is_complex():
            small.extend(condensed(tensor))
        else:
            small.append(tensor)
    return small


def blocks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one device in order, in lists that are copied together."""
    block: list[Tensor] = []
    entries = 0
    least = _BLOCK_CPU if tensors and _on_host(tensors[0].device) else _BLOCK
    for tensor in tensors:
        block.append(tensor)
        entries += tensor.numel()
        if entries >= least:
            yield block
            block, entries = [], 0
    if block:
        yield block


def flat(tensors: list[Tensor]) -> Tensor:
    """The entries of all tensors in one, by one copy."""
    found: Tensor = torch._C._nn.flatten_dense_tensors(tensors)
    return found


def _squared_norm(block: list[Tensor]) -> Tensor:
    entries = flat(block).double()
    return torch.dot(entries, entries)


def _row_norms(tensor: Tensor) -> list[Tensor]:
    """Norms of rows of 512 entries of `tensor`, and of the remainder, at least in float32."""
    if tensor.dim() == 4 and not tensor.is_contiguous():  # channels-last: the order of entries is free, so no copy
        tensor = tensor.permute(0, 2, 3, 1)
    flat = tensor.reshape(-1)
    dtype = torch.float32 if flat.dtype.itemsize < 4 else None
    whole = flat.numel() - flat.numel() % _ROW
    norms = [torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=dtype)]
    if whole < flat.numel():
        norms.append(torch.linalg.vector_norm(flat[whole:], dim=0, keepdim=True, dtype=dtype))
    return norms
