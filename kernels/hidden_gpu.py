"""Hidden features of mlp and gated_mlp on a GPU, and gated_act: h and its derivatives in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.hidden_form import parts, z_scale
from fusekit.kernels.launch import Plans, Repeated, kind_of
from fusekit.kernels.linear_gpu import share_rows


@triton.jit
def _hidden_kernel(
    dh_ptr, z_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, partial_ptr, partial_up_ptr, maxima_ptr, M, N,
    rows_per_program, stride_z, stride_up, stride_dz, stride_partial,
    ACT: tl.constexpr, BACKWARD: tl.constexpr, Z_SCALE: tl.constexpr, BY_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * rows_per_program
    last = min(first + rows_per_program, M)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total_up = tl.zeros((BLOCK_N,), dtype=tl.float32)
    largest = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)  # patterns of magnitudes: NaN above infinity
    for row in range(first, last, BLOCK_M):
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < last)[:, None] & (columns < N)[None, :]
        offsets = rows[:, None] * N + columns[None, :]
        dz_offsets = rows[:, None] * stride_dz + columns[None, :]
        z = tl.load(z_ptr + rows[:, None] * stride_z + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if Z_SCALE != 1.0:
            z *= 1.0 / Z_SCALE
        h = ACT(z)
        if up_ptr is not None:
            up = tl.load(up_ptr + rows[:, None] * stride_up + columns[None, :], mask=mask, other=0.0)
            up = up.to(tl.float32)
            if dh_ptr is not None:
                dh = tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                dup = dh * h
                dgate = BACKWARD(dh * up, z)
                tl.store(dup_ptr + dz_offsets, dup.to(dup_ptr.dtype.element_ty), mask=mask)
                tl.store(dgate_ptr + dz_offsets, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
                if partial_ptr is not None:
                    total += tl.sum(dgate, axis=0)
                if partial_up_ptr is not None:
                    total_up += tl.sum(dup, axis=0)
            h *= up
        if h_ptr is not None:
            h = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + offsets, h, mask=mask)
        if maxima_ptr is not None:
            magnitude = tl.where(mask, h.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
            largest = tl.maximum(largest, magnitude)
            if BY_ROW:
                tl.atomic_max(maxima_ptr + rows, tl.max(magnitude, 1), mask=rows < last, sem="relaxed")
    partials = tl.program_id(1).to(tl.int64) * stride_partial + columns
    if partial_ptr is not None:
        tl.store(partial_ptr + partials, total, mask=columns < N)
    if partial_up_ptr is not None:
        tl.store(partial_up_ptr + partials, total_up, mask=columns < N)
    if maxima_ptr is not None:
        of_columns = tl.max(largest, 0)
        if BY_ROW:
            tl.atomic_max(maxima_ptr + M + columns, of_columns, mask=columns < N, sem="relaxed")
        else:
            tl.atomic_max(maxima_ptr, tl.max(of_columns, 0), sem="relaxed")


BLOCK_M, BLOCK_N, NUM_WARPS = 16, 128, 4
PROGRAMS = 1024  # about 8 of 4 warps for each of 132 multiprocessors
_passes = Plans()


def hidden_pass(
    z: list[Tensor],
    dh: Tensor | None,
    act: str,
    form: str,
    h: Tensor | None,
    dzs: list[Tensor],
    with_sums: bool = False,
    maxima: Tensor | None = None,
) -> list[Tensor]:
    """Write h, and with dh the gradients dzs of z; returns float32 partial sums of their columns, if wanted.

    Args:
        z: what the first products gave, (M, H) each or (M, 2 H) where packed, rows contiguous; at z_scale.
        dh: (M, H), contiguous. Its memory may be the first of dzs', where z is not packed.
        h: (M, H), contiguous; None is not wanted.
        dzs: none, or tensors of z's shapes whose rows are contiguous and equally far apart.
        maxima: raised to h's largest magnitudes, as linear_fp8 does (fp8_maxima.py).
    """
    gate, up = parts(z, form)
    M, H = gate.shape
    key = act, form, h is None, with_sums, M, H, gate.get_device(), *map(kind_of, (gate, up, dh, maxima))
    by_row = maxima is not None and maxima.numel() > 1
    start, programs, rows = _passes(
        (*key, by_row), lambda: _plan(M, H, act, z_scale(gate.dtype, form), by_row)
    )
    partials = [dz.new_empty((programs, dz.shape[1]), dtype=torch.float32) for dz in dzs if with_sums]
    dgate, dup = parts(dzs, form) if dzs else (None, None)
    partial, partial_up = parts(partials, form) if partials else (None, None)
    start(
        dh, gate, up, dgate, dup, h, partial, partial_up,
        None if maxima is None else maxima.view(torch.int32), M, H, rows, gate.stride(0),
        *(0 if t is None else t.stride(0) for t in (up, dgate, partial)),
    )  # fmt: skip
    return partials


def _plan(M: int, H: int, act: str, scale: float, by_row: bool) -> tuple[Repeated, int, int]:
    """The start, the programs that share the rows, and the rows of each."""
    programs, rows = share_rows(M, H, BLOCK_M, BLOCK_N, PROGRAMS)
    start = Repeated(
        _hidden_kernel, (triton.cdiv(H, BLOCK_N), programs),
        ACT=ACTIVATIONS[act].kernel, BACKWARD=ACTIVATIONS[act].kernel_backward,
        Z_SCALE=scale, BY_ROW=by_row, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
    )  # fmt: skip
    return start, programs, rows
