r"""One tiled matrix product for all three of a linear layer, any strides, with the forward's epilogue.

    output = act(a @ b + bias) + residual          a (M, K), b (K, N), float32 accumulator, one rounding

Transposes are strides, so grad_input = dz @ weight and grad_weight = dz.T @ x are the same kernel. Without an
epilogue, K may be split over programs: each writes a float32 partial and a second pass adds them in order, so
the result is the same every run. Programs are grouped so that neighbours share rows of a and columns of b.

TILES holds what compiles clean for sm_80, sm_90 and sm_100 with Triton 3.6 and 3.8: no spill, and no wgmma
that ptxas serialises, which on Triton 3.6 rules out the textbook 128 x 256 tile with 8 warps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.launch import launch

SMS = 132  # streaming multiprocessors of an H100 or H200; only the choice of a tile and of splits rests on it
GROUP_M = tl.constexpr(8)
SUM_ELEMENTS = 2048  # of partial sums that one program reads at once


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


# large: such tiles occupy most of the device. split: they do not, and K is long enough to share; 4 warps,
# since Triton 3.6 serialises the wgmma of 8 with a float32 output. ragged: rows are not 16 bytes apart, so
# elements are loaded one by one, through registers.
TILES = {
    ("half", "large"): Tile(128, 128, 64, 8, 3),
    ("half", "split"): Tile(128, 128, 64, 4, 3),
    ("half", "small"): Tile(64, 64, 64, 8, 4),
    ("half", "ragged"): Tile(64, 64, 32, 8, 2),
    ("tf32", "large"): Tile(64, 64, 32, 8, 4),
    ("tf32", "split"): Tile(64, 64, 32, 8, 4),
    ("tf32", "small"): Tile(64, 64, 32, 8, 4),
    ("tf32", "ragged"): Tile(64, 64, 32, 8, 2),
    ("ieee", "large"): Tile(64, 64, 16, 8, 3),
    ("ieee", "split"): Tile(64, 64, 16, 8, 3),
    ("ieee", "small"): Tile(64, 64, 16, 8, 3),
    ("ieee", "ragged"): Tile(64, 32, 16, 8, 2),
}


@triton.jit
def _gemm_kernel(
    a_ptr, b_ptr, output_ptr, bias_ptr, residual_ptr, z_ptr,
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, stride_rm, stride_rn,
    ACT: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * blocks_n)
    group_rows = min(blocks_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    block_m = group * GROUP_M + within % group_rows
    block_n = within // group_rows

    # Rows and columns past the end wrap around instead of being masked: the loop stays free of predicates,
    # and what they compute is not stored. Offsets are 64 bits wide: they may pass 2^31 elements.
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)

    steps = tl.cdiv(K, BLOCK_K)
    if SPLITS > 1:
        steps = steps // SPLITS  # exact: so chosen
    first = tl.program_id(1) * steps

    start = (first * BLOCK_K + depth).to(tl.int64)
    a_ptrs = a_ptr + (rows % M).to(tl.int64)[:, None] * stride_am + start[None, :] * stride_ak
    b_ptrs = b_ptr + start[:, None] * stride_bk + (columns % N).to(tl.int64)[None, :] * stride_bn
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, steps):
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = depth < K - (first + step) * BLOCK_K
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk

    mask = (rows < M)[:, None] & (columns < N)[None, :]
    wide_rows, wide_columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    offsets = wide_rows * stride_om + wide_columns * stride_on
    if SPLITS > 1:
        output_ptr += tl.program_id(1).to(tl.int64) * M * N
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offsets, accumulator.to(z_ptr.dtype.element_ty), mask=mask)
    output = ACT(accumulator)
    if residual_ptr is not None:
        residual = wide_rows * stride_rm + wide_columns * stride_rn
        output += tl.load(residual_ptr + residual, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_kernel(partial_ptr, total_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (columns < N)[None, :]
        offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
        total += tl.sum(tl.load(partial_ptr + offsets, mask=mask, other=0.0), axis=0)
    tl.store(total_ptr + columns, total.to(total_ptr.dtype.element_ty), mask=columns < N)


def sum_partials(partials: Tensor, total: Tensor) -> None:
    """Add (P, ...) float32 partials in a fixed order into `total`, of the remaining shape and contiguous."""
    P, N = partials.shape[0], total.numel()
    block_p = min(32, triton.next_power_of_2(P))
    block_n = SUM_ELEMENTS // block_p
    launch(_sum_kernel, (triton.cdiv(N, block_n),), partials, total, P, N,
           BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4)  # fmt: skip


def choose(kind: str, M: int, N: int, K: int, splittable: bool) -> tuple[Tile, int]:
    """The tile and the number of splits of K, exact, for one product of aligned rows."""
    tile = TILES[kind, "large"]
    blocks = triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n)
    if blocks >= SMS * 3 // 4:
        return tile, 1
    if splittable and blocks:  # at least 8 steps of K each, or the partials' traffic outweighs the occupancy
        tile = TILES[kind, "split"]
        steps = triton.cdiv(K, tile.k)
        splits = max((s for s in range(1, min(SMS // blocks, steps // 8) + 1) if steps % s == 0), default=1)
        if blocks * splits >= SMS // 2:
            return tile, splits
    return TILES[kind, "small"], 1


def _aligned(x: Tensor | None) -> bool:
    """Whether 16 bytes of x load at once."""
    if x is None:
        return True
    row, column = x.stride()
    elements = 16 // x.element_size()
    return min(row, column) == 1 and max(row, column) % elements == 0 and x.storage_offset() % elements == 0


def matmul(
    a: Tensor,
    b: Tensor,
    output: Tensor,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    z: Tensor | None = None,
    tf32: bool = False,
) -> None:
    """Compute act(a @ b + bias) + residual into `output`, and a @ b + bias into `z`.

    Args:
        a: (M, K), any strides; K may be 0.
        b: (K, N), any strides, of a's dtype.
        output: (M, N), any strides.
        bias: (N,) contiguous.
        residual: (M, N), any strides.
        z: (M, N) with output's strides.
        tf32: multiply float32 through tensor cores, operands rounded to 10 mantissa bits.
    """
    plain = bias is None and residual is None and z is None and act == "none"
    if plain and output.stride(0) == 1 and output.stride(1) != 1:  # column-major: the transposed product
        a, b, output = b.t(), a.t(), output.t()
    (M, K), N = a.shape, b.shape[1]
    kind = "half" if a.dtype != torch.float32 else "tf32" if tf32 else "ieee"
    tile, splits = TILES[kind, "ragged"], 1
    if all(map(_aligned, (a, b, output, residual))):
        tile, splits = choose(kind, M, N, K, splittable=plain and output.is_contiguous())
    target = output if splits == 1 else output.new_empty((splits, M, N), dtype=torch.float32)
    residual_strides = (0, 0) if residual is None else residual.stride()
    launch(
        _gemm_kernel, (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n), splits),
        a, b, target, bias, residual, z, M, N, K,
        *a.stride(), *b.stride(), *target.stride()[-2:], *residual_strides,
        ACT=ACTIVATIONS[act].kernel, PRECISION="tf32" if tf32 else "ieee", SPLITS=splits,
        EVEN_K=K % tile.k == 0, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        sum_partials(target, output)
