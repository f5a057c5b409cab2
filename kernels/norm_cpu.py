"""The call of cpu/norm.cpp: the backward pass of both norms over bfloat16 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import cpu_library

SUMS = 64  # partial sums of the parameters' gradients, added up in this order whatever the threads


def takes(h: Tensor) -> bool:
    return h.dtype == torch.bfloat16 and h.numel() > 0 and cpu_library.available()


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (h's shape, contiguous), and the float32 (N,) sums for weight and bias; None where not needed.

    Args:
        mean: (M,) float32 of M rows; None for RMSNorm. rstd: (M,). scale: (N,) float32.
    """
    N = h.shape[-1]
    M = h.numel() // N
    parts = min(SUMS, M)
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if needed[0] else None
    sums = [h.new_zeros((parts, N), dtype=torch.float32) if need else None for need in needed[1:]]
    rows = (None if t is None else t.contiguous() for t in (dy, dh, h))
    cpu_library.call("norm_backward", *rows, mean, rstd, scale, dx, *sums, M, N, parts)
    of_weight, of_bias = (None if t is None else t.sum(0) for t in sums)
    return dx, of_weight, of_bias
