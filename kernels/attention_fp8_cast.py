"""q, k and v to e4m3 and back on a GPU, a head at a time: attention_fp8_format.py has it, bit for bit.

Codes of q and k are (B, H, T, D), those of v (B, H, D, T): FP8 products contract along adjacent elements. T
is padded by zeros to a multiple of 128. "head" reads a tensor twice, first for the largest magnitudes; of
"block" a tile is a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.attention_fp8_format import BLOCK, CODE, groups
from fusekit.kernels.attention_tiles import head_offset
from fusekit.kernels.fp8_cast import LEAST_AMAX, encode, has_exact_cast, scales_of
from fusekit.kernels.fp8_format import TOP_EXPONENT
from fusekit.kernels.launch import launch
from fusekit.kernels.recipe import LARGEST

WARPS = 8


class Codes(NamedTuple):
    """uint8 codes, and the float32 factor of each group, (B, H, groups): value = code * inverse."""

    codes: Tensor
    inverse: Tensor


@triton.jit
def _load_finite(x_ptr, index, block, H, T, stride_b, stride_h, stride_t, stride_d,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """A tile of one head in float32, and the integer pattern of its largest finite magnitude."""
    rows = block * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    x_ptr += head_offset(stride_b, stride_h, index // H, index % H)
    offsets = rows.to(tl.int64)[:, None] * stride_t + features[None, :] * stride_d
    x = tl.load(x_ptr + offsets, mask=(rows < T)[:, None] & (features < D)[None, :], other=0.0).to(tl.float32)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.max(tl.where(magnitude < 0x7F800000, magnitude, 0), axis=1), axis=0)
    return tl.where(magnitude == 0x7F800000, float("nan"), x), largest


@triton.jit
def head_amax_kernel(
    x_ptr, amax_ptr, H, T, stride_b, stride_h, stride_t, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    index = tl.program_id(0) // blocks
    _, largest = _load_finite(
        x_ptr,
        index,
        tl.program_id(0) % blocks,
        H,
        T,
        stride_b,
        stride_h,
        stride_t,
        stride_d,
        D,
        BLOCK_D,
        ROWS,
    )
    tl.atomic_max(amax_ptr + index, largest, sem="relaxed")


@triton.jit
def head_cast_kernel(
    x_ptr, codes_ptr, inverse_ptr, amax_ptr, H, T, stride_b, stride_h, stride_t, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr,
    HARDWARE: tl.constexpr, LARGEST_CODE: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """amax_ptr: of "head"; without it a tile is a group."""
    blocks = tl.cdiv(T, ROWS)
    index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    x, largest = _load_finite(
        x_ptr, index, block, H, T, stride_b, stride_h, stride_t, stride_d, D, BLOCK_D, ROWS
    )
    if amax_ptr is not None:
        largest = tl.load(amax_ptr + index)
    scale, inverse = scales_of(largest, LARGEST_CODE, TOP, LEAST, True)
    if amax_ptr is None:
        tl.store(inverse_ptr + tl.program_id(0), inverse)
    else:
        tl.store(inverse_ptr + index, inverse, mask=block == 0)
    code = encode(x * scale, False, HARDWARE)
    rows = block * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    codes_ptr += index.to(tl.int64) * blocks * ROWS * D
    if TRANSPOSED:
        ptrs = codes_ptr + features[:, None] * (blocks * ROWS) + rows[None, :]
        tl.store(ptrs, tl.trans(code), mask=(features < D)[:, None])
    else:
        ptrs = codes_ptr + rows[:, None] * D + features[None, :]
        tl.store(ptrs, code, mask=(features < D)[None, :])


@triton.jit
def decode_e4m3(code):
    """uint8 to float16: 2^-8 of the value, NaN as NaN."""
    bits = code.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    half = tl.where((bits & 0x7F) == 0x7F, 0x7E00, half).to(tl.uint16)
    return half.to(tl.float16, bitcast=True)


@triton.jit
def head_values_kernel(
    codes_ptr, inverse_ptr, x_ptr, H, T, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Values in (B, T, H, D) memory. BLOCKS: a tile is a group."""
    blocks = tl.cdiv(T, ROWS)
    index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = block * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    codes_ptr += index.to(tl.int64) * blocks * ROWS * D
    if TRANSPOSED:
        ptrs = codes_ptr + features[:, None] * (blocks * ROWS) + rows[None, :]
        code = tl.trans(tl.load(ptrs, mask=(features < D)[:, None], other=0))
    else:
        code = tl.load(
            codes_ptr + rows[:, None] * D + features[None, :], mask=(features < D)[None, :], other=0
        )
    inverse = tl.load(inverse_ptr + (tl.program_id(0) if BLOCKS else index))
    value = decode_e4m3(code).to(tl.float32) * 256.0 * inverse
    x_ptr += (index // H).to(tl.int64) * T * H * D + (index % H) * D
    ptrs = x_ptr + rows.to(tl.int64)[:, None] * (H * D) + features[None, :]
    tl.store(ptrs, value.to(x_ptr.dtype.element_ty), mask=(rows < T)[:, None] & (features < D)[None, :])


def padded(T: int) -> int:
    """Tokens of a head of codes."""
    return -(-T // BLOCK) * BLOCK


def empty(x: Tensor, scaling: str, transposed: bool) -> Codes:
    """Memory for the codes of x (B, H, T, D) and their inverse scales."""
    B, H, T, D = x.shape
    shape = (B, H, D, padded(T)) if transposed else (B, H, padded(T), D)
    inverse = x.new_empty((B, H, groups(T, scaling)), dtype=torch.float32)
    return Codes(x.new_empty(shape, dtype=torch.uint8), inverse)


def cast(x: Tensor, scaling: str, transposed: bool = False, hardware: bool | None = None) -> Codes:
    """The codes of x (B, H, T, D), any strides; transposed to (B, H, D, T) for what contracts over tokens.

    hardware: whether the processor casts; by default where its cast is exact.
    """
    B, H, T, D = x.shape
    made = empty(x, scaling, transposed)
    sizes = {"D": D, "BLOCK_D": triton.next_power_of_2(D), "ROWS": BLOCK}
    grid = (B * H * triton.cdiv(T, BLOCK),)
    amax = None
    if scaling == "head":
        amax = torch.zeros(B * H, dtype=torch.int32, device=x.device)
        launch(head_amax_kernel, grid, x, amax, H, T, *x.stride(), **sizes, num_warps=WARPS)
    launch(
        head_cast_kernel, grid, x, *made, amax, H, T, *x.stride(), **sizes, TRANSPOSED=transposed,
        HARDWARE=has_exact_cast(x) if hardware is None else hardware, LARGEST_CODE=LARGEST[CODE],
        TOP=TOP_EXPONENT[CODE], LEAST=LEAST_AMAX[CODE], num_warps=WARPS,
    )  # fmt: skip
    return made


def values(held: Codes, scaling: str, T: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """(B, H, T, D) in (B, T, H, D) memory: what the codes stand for."""
    B, H = held.codes.shape[:2]
    D = held.codes.shape[2 if transposed else 3]
    x = held.codes.new_empty((B, T, H, D), dtype=dtype)
    launch(
        head_values_kernel, (B * H * triton.cdiv(T, BLOCK),), *held, x, H, T, D=D,
        BLOCK_D=triton.next_power_of_2(D), ROWS=BLOCK, TRANSPOSED=transposed, BLOCKS=scaling == "block",
        num_warps=WARPS,
    )  # fmt: skip
    return x.transpose(1, 2)
