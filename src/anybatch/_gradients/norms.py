"""Squared norms of gradients, combined in float64.

Variances here are differences of squared norms that may agree in six digits, so a norm in float32 must not lose
any. A float32 reduction over a long flat CPU tensor does: off by 2e-4 at 8 million elements, 1 % at 67 million.
Norms of rows of 512, combined in float64, are right to 2e-9 at 1.05 times the cost; below 16384 elements the conversion
of the whole tensor to float64 is cheaper still.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_ROW = 512  # not a power of 4: entries of equal size would put the rows' norms on a binade's edge, 4e-8 off
_SMALL = 16384


@dataclass(frozen=True)
class SquaredNorms:
    """What one optimizer step saw of its gradient samples.

    With samples `g_i`, each the mean gradient of one micro-batch, and `gbar` their mean:

        mean_square = (1/N) * sum_i ||g_i||^2        square_mean = ||gbar||^2

    Args:
        mean_square: mean of the squared norms, grad^2.
        square_mean: squared norm of the mean, grad^2.
        count: number of samples N; at least 1.
    """

    mean_square: float
    square_mean: float
    count: int


def norm_into(out: Tensor, tensor: Tensor) -> None:
    """Write the Euclidean norm of `tensor` (not squared) into `out`, a float64 tensor of shape `[]`.

    One dispatched operation for a small tensor, two to four for a large one; no memory of the tensor's size.
    """
    tensor = real_of(tensor)
    if tensor.numel() >= _SMALL:
        tensor = _row_norms(tensor)
    torch.linalg.vector_norm(tensor, dtype=torch.float64, out=out)


def total_squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squared norms of `tensors`: a float64 tensor of shape `[]` on the first tensor's device."""
    small: dict[torch.device, list[Tensor]] = {}
    norms: list[Tensor] = []
    for each in tensors:
        tensor = real_of(each)
        if tensor.numel() < _SMALL:
            small.setdefault(tensor.device, []).append(tensor)
        else:
            norms.append(torch.linalg.vector_norm(_row_norms(tensor), dtype=torch.float64))
    for group in small.values():
        norms.extend(torch._foreach_norm(group, 2, dtype=torch.float64))
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    device = norms[0].device
    return torch.stack([norm.to(device) for norm in norms]).square().sum()


def sample_squared_norm(samples: Tensor) -> Tensor:
    """Sum over all entries of `samples`, shape `[n, ...]`, of their squares, in float64, shape `[]`."""
    samples = real_of(samples)
    if samples.numel() >= _SMALL:
        samples = _row_norms(samples)
    norm: Tensor = torch.linalg.vector_norm(samples, dtype=torch.float64)
    return norm.square()


def real_of(tensor: Tensor) -> Tensor:
    """A strided, real tensor with the same entries and no graph; the tensor itself where it is one already."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor


def _row_norms(tensor: Tensor) -> Tensor:
    """Norms of rows of 512 entries of `tensor`, and of what is left, at least in float32."""
    if tensor.dim() == 4 and not tensor.is_contiguous():  # channels-last: the order of entries is free, so no copy
        tensor = tensor.permute(0, 2, 3, 1)
    flat = tensor.reshape(-1)
    dtype = torch.float32 if flat.dtype.itemsize < 4 else None
    whole = flat.numel() - flat.numel() % _ROW
    norms: Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=dtype)
    if whole == flat.numel():
        return norms
    return torch.cat([norms, torch.linalg.vector_norm(flat[whole:], dim=0, keepdim=True, dtype=dtype)])
