"""Backward passes of the norms on a CPU: cpu/norm.cpp over bfloat16 rows of both, ATen over widened ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import cpu_library
from fusekit.kernels.row_reduction import row_chunks, widened

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


aten_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def layer_norm_backward_widened(
    dy: Tensor, dh: Tensor | None, h: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, needed: list[bool]
) -> list[Any]:
    """dx rounded once, and float32 sums: ATen would sum in h's dtype, in bfloat16 30 floors off."""
    N = h.shape[-1]
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if needed[0] else None
    totals = [h.new_zeros(N, dtype=torch.float32) if need else None for need in needed[1:]]
    buffers: tuple[Tensor, ...] = ()
    rows = (t if t is None else t.reshape(-1, N) for t in (dy, h, dh, dx))
    for dy_rows, h_rows, dh_rows, out, *statistics in row_chunks(*rows, mean[:, None], rstd[:, None]):
        buffers = buffers or tuple(torch.empty_like(h_rows, dtype=torch.float32) for _ in range(2))
        wide = widened(dy_rows, buffers[0]), widened(h_rows, buffers[1])
        part, *sums = aten_layer_norm_backward(*wide, (N,), *statistics, scale, scale, needed)
        if out is not None:
            out.copy_(part if dh_rows is None else part.add_(widened(dh_rows, buffers[0])))
        for total, summand in zip(totals, sums, strict=True):
            if total is not None:
                total += summand
    return [dx, *totals]
