r"""Product of two FP8 operands, both contiguous along the contraction: output = act(A B^T + bias).

Codes and inverse scales are those of fp8_cast.py. How one step of 128 of the contraction is added:

    promote128   float32 registers += tensor core sum of the step: Hopper's FP8 accumulator keeps about 14
                 bits, and what is added to it over a long contraction is cut towards zero. Blackwell's holds
                 float32, and there the compiler adds in it
    fast         the step is added inside the tensor core
    block        promote128, the step's sum times the scales of its groups: costs nothing more
    decoded      codes become float16 in registers, which holds every one of them, and float16's own products
                 and float32 sums do the rest: Ampere, which has no FP8, and accumulation="fp32" anywhere
    mx           decoded to bfloat16 and scaled there, exact too since scales are powers of two

An e4m3 code with its bits moved to float16's fields is 2^-8 of its value; the epilogue makes up for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.fp8_exact import exact_product
from fusekit.kernels.fp8_format import MX_GROUP, Operand, spread
from fusekit.kernels.gemm_kernels import _place
from fusekit.kernels.launch import capability, launch
from fusekit.kernels.recipe import Recipe

GROUP = 8  # block rows that neighbouring programs share
STEP = 128  # of the contraction between promotions, and a group of block scaling


class Tile(NamedTuple):
    """Tile sizes of one product."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


# Those that compile clean with Triton 3.6 and 3.8. Promoted sums have two accumulators in registers, so 128
# columns are the most; of fast ones ptxas serialises wgmma with 8 warps and not with 4. Blackwell's block
# sums come out of tensor memory, and with 128 columns they spill 1,224 bytes.
PROMOTED_TILE = Tile(128, 128, 128, 8, 3)
FAST_TILE = Tile(128, 128, 128, 4, 3)
BLACKWELL_BLOCK_TILE = Tile(128, 64, 128, 8, 3)
DECODED_TILE = Tile(128, 128, 64, 8, 3)


@triton.jit
def decode(code, E5M2: tl.constexpr):
    """uint8 to float16: the value of e5m2, 2^-8 of the value of e4m3. The one NaN of e4m3 becomes 1.875."""
    bits = code.to(tl.uint16)
    half = bits << 8 if E5M2 else ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True)


@triton.jit
def _decode_mx(code, inverse, E5M2: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(ROWS, BLOCK_K) codes and (ROWS, BLOCK_K / 32) inverse scales to bfloat16 values."""
    value = decode(code, E5M2).to(tl.float32)
    value = tl.reshape(value, (ROWS, BLOCK_K // 32, 32)) * inverse[:, :, None]
    if not E5M2:
        value *= 256.0
    return tl.reshape(value, (ROWS, BLOCK_K)).to(tl.bfloat16)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, output_ptr, a_inverse_ptr, b_inverse_ptr, bias_ptr, z_ptr, maxima_ptr, M, N, K, b_groups,
    stride_om,
    SCALING: tl.constexpr, SQUARE: tl.constexpr, NATIVE: tl.constexpr, PROMOTE: tl.constexpr,
    A_E5M2: tl.constexpr, B_E5M2: tl.constexpr, ACT: tl.constexpr, BY_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """K: of the padded rows of both operands. b_groups: inverse scales of b at one step. SQUARE: b's groups
    are 128 rows tall. BY_ROW: maxima are of the output's rows, then of its columns, else of all of it."""
    block_m, block_n = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end wrap around: what they compute is not stored.
    a_rows, b_rows = rows % M, columns % N
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + a_rows.to(tl.int64)[:, None] * K + depth[None, :]
    b_ptrs = b_ptr + b_rows.to(tl.int64)[None, :] * K + depth[:, None]
    b_group = b_rows // 128 if SQUARE else b_rows
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs)
        b = tl.load(b_ptrs)
        if SCALING == "mx":
            groups = (k // 32 + tl.arange(0, BLOCK_K // 32)).to(tl.int64)[None, :]
            a_scale = tl.load(a_inverse_ptr + groups * M + a_rows[:, None])
            b_scale = tl.load(b_inverse_ptr + groups * N + b_rows[:, None])
            a16 = _decode_mx(a, a_scale, A_E5M2, BLOCK_M, BLOCK_K)
            b16 = _decode_mx(tl.trans(b), b_scale, B_E5M2, BLOCK_N, BLOCK_K)
            accumulator = tl.dot(a16, tl.trans(b16), accumulator)
        else:
            if not NATIVE:
                a = decode(a, A_E5M2)
                b = decode(b, B_E5M2)
            if SCALING == "block":
                step = tl.cast(k // 128, tl.int64)
                a_scale = tl.load(a_inverse_ptr + step * M + a_rows)
                b_scale = tl.load(b_inverse_ptr + step * b_groups + b_group)
                accumulator += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
            elif PROMOTE:
                accumulator += tl.dot(a, b)
            else:
                accumulator = tl.dot(a, b, accumulator)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    if SCALING != "mx" and not NATIVE:
        accumulator *= (1.0 if A_E5M2 else 256.0) * (1.0 if B_E5M2 else 256.0)
    if SCALING == "tensor":
        accumulator = accumulator * tl.load(a_inverse_ptr) * tl.load(b_inverse_ptr)
    if SCALING == "row":
        accumulator *= tl.load(a_inverse_ptr + a_rows)[:, None]
        accumulator *= tl.load(b_inverse_ptr + b_rows)[None, :]
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + b_rows).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_om + columns[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offsets, accumulator.to(z_ptr.dtype.element_ty), mask=mask)
    output = ACT(accumulator).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + offsets, output, mask=mask)
    if maxima_ptr is not None:
        magnitude = tl.where(mask, output.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        of_rows = tl.max(magnitude, 1)
        if BY_ROW:
            tl.atomic_max(maxima_ptr + rows, of_rows, mask=rows < M, sem="relaxed")
            of_columns = tl.max(magnitude, 0)
            tl.atomic_max(maxima_ptr + M + columns, of_columns, mask=columns < N, sem="relaxed")
        else:
            tl.atomic_max(maxima_ptr, tl.max(of_rows, 0), sem="relaxed")


def multiplies_fp8(x: Tensor) -> bool:
    """Whether the tensor cores take e4m3: Ada, Hopper, Blackwell."""
    return capability(x) >= (8, 9)


def _tile(x: Tensor, scaling: str, native: bool, fast: bool) -> Tile:
    if not native:
        return DECODED_TILE
    major, minor = capability(x)
    if (major, minor) == (8, 9) or major == 12:  # 99 KiB of shared memory
        return PROMOTED_TILE._replace(num_stages=2)
    if scaling == "block":
        return BLACKWELL_BLOCK_TILE if major == 10 else PROMOTED_TILE
    return FAST_TILE if fast else PROMOTED_TILE


def product(
    a: Operand,
    b: Operand,
    output: Tensor,
    recipe: Recipe,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    contraction: int,
    square: bool = False,
    bias: Tensor | None = None,
    act: str = "none",
    z: Tensor | None = None,
    fast: bool = False,
    maxima: Tensor | None = None,
    native: bool | None = None,
    tile: Tile | None = None,
) -> None:
    """Compute act(A B^T + bias) into `output`.

    Args:
        a, b: (M, K) and (N, K) of fp8_cast.
        output: (M, N), rows contiguous; z the same, where A B^T + bias is stored.
        recipe: whose scaling and accumulation hold.
        dtypes: of a's and b's codes.
        contraction: K before padding.
        square: b is a weight of block scaling.
        fast: this product may leave sums in the tensor core.
        maxima: float32, raised to the largest magnitudes of the output: one element of all of it, or M + N of
            its rows and columns.
        native, tile: instead of what the device is given, for tests.
    """
    if recipe.accumulation == "exact":
        return _exact(a, b, output, recipe, dtypes, contraction, square, bias, act, z)
    scaling = recipe.scaling
    if native is None:
        native = recipe.accumulation != "fp32" and scaling != "mx" and multiplies_fp8(output)
    tile = tile or _tile(output, scaling, native, fast)
    M, N, K = a.codes.shape[0], b.codes.shape[0], a.codes.shape[1]
    codes = [
        held.codes.view(dtype) if native else held.codes for held, dtype in zip((a, b), dtypes, strict=True)
    ]
    meta: dict[str, Any] = {
        "SCALING": scaling,
        "SQUARE": square,
        "NATIVE": native,
        "PROMOTE": native and not fast,
        "A_E5M2": dtypes[0] == torch.float8_e5m2,
        "B_E5M2": dtypes[1] == torch.float8_e5m2,
        "ACT": ACTIVATIONS[act].kernel,
        "BY_ROW": maxima is not None and maxima.numel() > 1,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP": GROUP,
    }
    grid = (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)
    launch(
        product_kernel, grid, *codes, output, a.inverse, b.inverse, bias, z,
        None if maxima is None else maxima.view(torch.int32), M, N, K, b.inverse.shape[1], output.stride(0),
        **meta, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def values(operand: Operand, recipe: Recipe, dtype: torch.dtype, contraction: int, square: bool) -> Tensor:
    """(rows, contraction) float32 values of an operand, by plain PyTorch."""
    rows, width = operand.codes.shape
    group = {"tensor": (rows, width), "row": (1, width), "mx": (1, MX_GROUP)}.get(
        recipe.scaling, (STEP if square else 1, STEP)
    )
    found = operand.codes.view(dtype).float() * spread(operand.inverse.t(), group, (rows, width))
    return found[:, :contraction]


def _exact(
    a: Operand, b: Operand, output: Tensor, recipe: Recipe, dtypes: tuple[torch.dtype, torch.dtype],
    contraction: int, square: bool, bias: Tensor | None, act: str, z: Tensor | None,
) -> None:  # fmt: skip
    left = values(a, recipe, dtypes[0], contraction, False)
    right = values(b, recipe, dtypes[1], contraction, square)
    wide = exact_product(left, right.t())
    wide = wide if bias is None else wide + bias
    for target, value in ((z, wide), (output, ACTIVATIONS[act].reference(wide))):
        if target is not None:
            target.copy_(value)
