r"""Two products of one operand in one kernel, and what a gated layer makes of them.

    gate = x @ w_gate.T + b_gate
    up = x @ w_up.T + b_up
    h = act(gate) * up          x (M, K), gate, up and h (M, H), float32 accumulators

Each tile of x is read once for both. gate and up are stored only where backward needs them, and h comes from
the accumulators, before they are rounded. A packed weight is two views of one.

TILES holds what compiles clean for sm_80, sm_90 and sm_100 with Triton 3.6 and 3.8: two accumulators in the
registers of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.hidden_cpu import parts
from fusekit.kernels.launch import launch

GROUP_M = tl.constexpr(8)
SMS = 132  # streaming multiprocessors of an H100 or H200; only the choice of a tile rests on it

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages); ragged: rows are not 16 bytes apart.
TILES = {
    ("half", "large"): (128, 64, 64, 8, 3),
    ("half", "small"): (64, 32, 64, 4, 4),
    ("half", "ragged"): (64, 32, 32, 8, 2),
    ("tf32", "large"): (64, 32, 32, 8, 4),
    ("tf32", "small"): (64, 32, 32, 8, 4),
    ("tf32", "ragged"): (64, 32, 32, 8, 2),
    ("ieee", "large"): (32, 32, 16, 4, 3),
    ("ieee", "small"): (32, 32, 16, 4, 3),
    ("ieee", "ragged"): (32, 32, 16, 4, 2),
}


@triton.jit
def _gated_kernel(
    x_ptr, gate_weight_ptr, up_weight_ptr, gate_bias_ptr, up_bias_ptr, gate_ptr, up_ptr, h_ptr,
    M, N, K, stride_xm, stride_xk, stride_gn, stride_gk, stride_un, stride_uk, stride_zm,
    ACT: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * blocks_n)
    group_rows = min(blocks_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    rows = (group * GROUP_M + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // group_rows) * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and columns past the end wrap around: what they compute is not stored.
    depth = tl.arange(0, BLOCK_K)
    wrapped = (columns % N).to(tl.int64)[None, :]
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_xm + depth[None, :] * stride_xk
    gate_ptrs = gate_weight_ptr + depth[:, None] * stride_gk + wrapped * stride_gn
    up_ptrs = up_weight_ptr + depth[:, None] * stride_uk + wrapped * stride_un
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            gate_weight = tl.load(gate_ptrs)
            up_weight = tl.load(up_ptrs)
        else:
            inside = depth < K - step * BLOCK_K
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=inside[:, None], other=0.0)
            up_weight = tl.load(up_ptrs, mask=inside[:, None], other=0.0)
        gate = tl.dot(x, gate_weight, gate, input_precision=PRECISION)
        up = tl.dot(x, up_weight, up, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        gate_ptrs += BLOCK_K * stride_gk
        up_ptrs += BLOCK_K * stride_uk

    mask = (rows < M)[:, None] & (columns < N)[None, :]
    wide_rows, wide_columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if gate_ptr is not None:
        offsets = wide_rows * stride_zm + wide_columns
        tl.store(gate_ptr + offsets, gate.to(gate_ptr.dtype.element_ty), mask=mask)
        tl.store(up_ptr + offsets, up.to(up_ptr.dtype.element_ty), mask=mask)
    h = ACT(gate) * up
    tl.store(h_ptr + wide_rows * N + wide_columns, h.to(h_ptr.dtype.element_ty), mask=mask)


def gated_matmul(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    act: str,
    form: str,
    h: Tensor,
    saved: list[Tensor],
    tf32: bool,
) -> None:
    """Compute act(gate) * up into `h`, and gate and up into `saved`.

    Args:
        x: (M, K), any strides.
        weights: (H, K) of gate and of up, any strides, or (2 H, K) of both.
        biases: (H,) or (2 H,) contiguous, or None, one for each weight.
        form: "gated" of two weights, "gate_up" or "up_gate" of one.
        h: (M, H) contiguous.
        saved: nothing, or contiguous (M, H) for each weight, (M, 2 H) where packed.
    """
    gate_weight, up_weight = parts([weight.t() for weight in weights], form)
    gate_bias, up_bias = _bias_parts(biases, form)
    gate, up = parts(saved, form) if saved else (None, None)
    assert up_weight is not None
    (M, K), N = x.shape, h.shape[1]
    kind = "half" if x.dtype != torch.float32 else "tf32" if tf32 else "ieee"
    size = "ragged"
    if all(map(_aligned, (x, gate_weight, up_weight))):
        large = TILES[kind, "large"]
        size = "large" if triton.cdiv(M, large[0]) * triton.cdiv(N, large[1]) >= SMS * 3 // 4 else "small"
    block_m, block_n, block_k, num_warps, num_stages = TILES[kind, size]
    launch(
        _gated_kernel, (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),),
        x, gate_weight, up_weight, gate_bias, up_bias, gate, up, h, M, N, K, *x.stride(),
        *gate_weight.t().stride(), *up_weight.t().stride(), 0 if gate is None else gate.stride(0),
        ACT=ACTIVATIONS[act].kernel, PRECISION="tf32" if tf32 else "ieee", EVEN_K=K % block_k == 0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _bias_parts(biases: list[Tensor | None], form: str) -> tuple[Tensor | None, Tensor | None]:
    if form == "gated":
        return biases[0], biases[1]
    return (None, None) if biases[0] is None else parts([biases[0]], form)


def _aligned(x: Tensor) -> bool:
    """Whether 16 bytes of x load at once."""
    row, column = x.stride()
    elements = 16 // x.element_size()
    return min(row, column) == 1 and max(row, column) % elements == 0 and x.storage_offset() % elements == 0
