"""q, k and v to e4m3 and back on a GPU, a head at a time: attention_fp8_format.py has it, bit for bit.

Codes of q and k are (B, H, T, D), those of v (B, H, D, T): FP8 products contract along adjacent elements. T
is padded by zeros to a multiple of 128. "head" reads a tensor twice, first for the largest magnitudes; of
"block" a tile is a group, up to 128 features.
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
def _group_of(index, block, TOKENS, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Of a tile, and whether it is the group's first. GROUP: its tokens, 0 for a whole head."""
    if GROUP == 0:
        return index, block == 0
    return (index * TOKENS + block * ROWS) // GROUP, block * ROWS % GROUP == 0


@triton.jit
def head_amax_kernel(
    x_ptr, amax_ptr, H, T, TOKENS, stride_b, stride_h, stride_t, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    index, block = tl.program_id(0) // (TOKENS // ROWS), tl.program_id(0) % (TOKENS // ROWS)
    _, largest = _load_finite(
        x_ptr, index, block, H, T, stride_b, stride_h, stride_t, stride_d, D, BLOCK_D, ROWS
    )
    group, _ = _group_of(index, block, TOKENS, ROWS, GROUP)
    tl.atomic_max(amax_ptr + group, largest, sem="relaxed")


@triton.jit
def head_cast_kernel(
    x_ptr, codes_ptr, inverse_ptr, amax_ptr, H, T, TOKENS, stride_b, stride_h, stride_t, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, TRANSPOSED: tl.constexpr,
    HARDWARE: tl.constexpr, LARGEST_CODE: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Without amax_ptr a tile is a group."""
    index, block = tl.program_id(0) // (TOKENS // ROWS), tl.program_id(0) % (TOKENS // ROWS)
    x, largest = _load_finite(
        x_ptr, index, block, H, T, stride_b, stride_h, stride_t, stride_d, D, BLOCK_D, ROWS
    )
    group, first = _group_of(index, block, TOKENS, ROWS, GROUP)
    if amax_ptr is not None:
        largest = tl.load(amax_ptr + group)
    scale, inverse = scales_of(largest, LARGEST_CODE, TOP, LEAST, True)
    tl.store(inverse_ptr + group, inverse, mask=first)
    code = encode(x * scale, False, HARDWARE)
    rows = block * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    codes_ptr += index.to(tl.int64) * TOKENS * D
    if TRANSPOSED:
        ptrs = codes_ptr + features[:, None] * TOKENS + rows[None, :]
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
    codes_ptr, inverse_ptr, x_ptr, H, T, TOKENS, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Values in (B, T, H, D) memory."""
    index, block = tl.program_id(0) // (TOKENS // ROWS), tl.program_id(0) % (TOKENS // ROWS)
    rows = block * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    inside = (features < D)[None, :]
    codes_ptr += index.to(tl.int64) * TOKENS * D
    if TRANSPOSED:
        ptrs = codes_ptr + features[:, None] * TOKENS + rows[None, :]
        code = tl.trans(tl.load(ptrs, mask=(features < D)[:, None], other=0))
    else:
        code = tl.load(codes_ptr + rows[:, None] * D + features[None, :], mask=inside, other=0)
    group, _ = _group_of(index, block, TOKENS, ROWS, GROUP)
    value = decode_e4m3(code).to(tl.float32) * 256.0 * tl.load(inverse_ptr + group)
    x_ptr += (index // H).to(tl.int64) * T * H * D + (index % H) * D
    ptrs = x_ptr + rows.to(tl.int64)[:, None] * (H * D) + features[None, :]
    tl.store(ptrs, value.to(x_ptr.dtype.element_ty), mask=(rows < T)[:, None] & inside)


def padded(T: int) -> int:
    """Tokens of a head of codes."""
    return -(-T // BLOCK) * BLOCK


def empty(x: Tensor, scaling: str, transposed: bool) -> Codes:
    """Memory for the codes of x (B, H, T, D) and their inverse scales."""
    B, H, T, D = x.shape
    shape = (B, H, D, padded(T)) if transposed else (B, H, padded(T), D)
    inverse = x.new_empty((B, H, groups(T, scaling)), dtype=torch.float32)
    return Codes(x.new_empty(shape, dtype=torch.uint8), inverse)


def _tile(D: int, scaling: str) -> dict[str, int]:
    rows = 64 if D > 128 else BLOCK  # a block of wider heads takes more registers than there are
    group = BLOCK if scaling == "block" else 0
    return {"D": D, "BLOCK_D": triton.next_power_of_2(D), "ROWS": rows, "GROUP": group, "num_warps": WARPS}


def cast(x: Tensor, scaling: str, transposed: bool = False, hardware: bool | None = None) -> Codes:
    """The codes of x (B, H, T, D), any strides; transposed to (B, H, D, T) for what contracts over tokens.

    hardware: whether the processor casts; by default where its cast is exact.
    """
    B, H, T, D = x.shape
    made, tile = empty(x, scaling, transposed), _tile(D, scaling)
    grid, sizes = (B * H * padded(T) // tile["ROWS"],), (H, T, padded(T))
    amax = None
    if tile["ROWS"] != tile["GROUP"]:
        amax = torch.zeros(made.inverse.numel(), dtype=torch.int32, device=x.device)
        launch(head_amax_kernel, grid, x, amax, *sizes, *x.stride(), **tile)
    launch(
        head_cast_kernel, grid, x, *made, amax, *sizes, *x.stride(), **tile, TRANSPOSED=transposed,
        HARDWARE=has_exact_cast(x) if hardware is None else hardware, LARGEST_CODE=LARGEST[CODE],
        TOP=TOP_EXPONENT[CODE], LEAST=LEAST_AMAX[CODE],
    )  # fmt: skip
    return made


def values(held: Codes, scaling: str, T: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """(B, H, T, D) in (B, T, H, D) memory: what the codes stand for."""
    B, H = held.codes.shape[:2]
    D = held.codes.shape[2 if transposed else 3]
    x, tile = held.codes.new_empty((B, T, H, D), dtype=dtype), _tile(D, scaling)
    grid = (B * H * padded(T) // tile["ROWS"],)
    launch(head_values_kernel, grid, *held, x, H, T, padded(T), **tile, TRANSPOSED=transposed)
    return x.transpose(1, 2)
