r"""FP8 quantisation on a GPU: both layouts of an operand from one read of it.

What it computes is fp8_format.py, bit for bit. Codes are stored as (rows, contraction), padded by zeros to a
multiple of 128, so that products load them unmasked and 16 bytes at a time; the second layout is that of the
transposed tensor. Inverse scales are stored group-major, (column groups, row groups): a product reads one row
of groups a step.

    tensor           a pass for amax (integer maximum of patterns: NaN > infinity > finite), a pass that casts
    tensor, delayed  one pass: scale is known, amax rides along. Before the first step there is none,
                     which only the device knows: a kernel that ends at once where there is one finds amax
    row              as tensor, with the largest magnitudes of all rows and all columns from one pass
    block, mx        one pass: a group never leaves its tile

The pass for amax is spared where the kernel that wrote the tensor kept count (norm_fp8.py).

The cast is the processor's own on Hopper and Blackwell. Ampere has none of e4m3, and Ada's rounds twice,
through float16: there codes are made by integers. Maxima of integers are atomic, and the same in any order.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.fp8_format import LARGEST_SCALE, TOP_EXPONENT, Operand
from fusekit.kernels.launch import capability, launch
from fusekit.kernels.recipe import LARGEST, Recipe

TILE = 128
FIRST_PROGRAMS = 256  # of first_amax_kernel: starting them is all that it costs after the first step
WARPS = 16  # with 8, both layouts of float32 rows take 128 registers and spill

_ONE = tl.constexpr(127)  # the exponent field of 1


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


LEAST_AMAX = {dtype: _bits(largest / LARGEST_SCALE) for dtype, largest in LARGEST.items()}


@triton.jit
def encode(x, E5M2: tl.constexpr, HARDWARE: tl.constexpr):
    """uint8 codes of float32: round to nearest even, saturate, NaN stays."""
    if HARDWARE:
        if E5M2:
            code = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
        else:
            code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return code
    MANTISSA: tl.constexpr = 2 if E5M2 else 3
    LOWEST: tl.constexpr = 113 if E5M2 else 121  # the exponent field of the smallest normal code
    MOST: tl.constexpr = 0x47600000 if E5M2 else 0x43E00000  # 57344 and 448
    LAST: tl.constexpr = 0x7B if E5M2 else 0x7E
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    clamped = tl.minimum(magnitude, MOST)
    power = tl.maximum(clamped & 0x7F800000, LOWEST << 23)
    # Adding 2^(23 - m) times the power of two below |x| leaves m bits: the addition rounds.
    magic = power + ((23 - MANTISSA) << 23)
    total = clamped.to(tl.float32, bitcast=True) + magic.to(tl.float32, bitcast=True)
    code = (((power >> 23) - LOWEST) << MANTISSA) + total.to(tl.int32, bitcast=True) - magic
    code = tl.where(magnitude > 0x7F800000, 0x7F, tl.minimum(code, LAST))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def scales_of(
    pattern, LARGEST_CODE: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """Scale and inverse scale of a group from the integer pattern of its amax."""
    finite = pattern < 0x7F800000
    if POWER_OF_TWO:
        clamped = tl.maximum(pattern, LEAST)
        exponent = (clamped >> 23) + ((clamped & 0x7FFFFF) > 0x600000).to(tl.int32)
        field = tl.where((pattern > 0) & finite, 254 + TOP - exponent, _ONE)
        scale = (field << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - field) << 23).to(tl.float32, bitcast=True)
    else:
        amax = tl.where((pattern > 0) & finite, pattern, _ONE << 23).to(tl.float32, bitcast=True)
        quotient = tl.div_rn(tl.full(pattern.shape, LARGEST_CODE, tl.float32), amax)
        scale = tl.where((pattern > 0) & finite, tl.minimum(quotient, 1.2676506002282294e30), 1.0)  # 2^100
        inverse = tl.div_rn(tl.full(pattern.shape, 1.0, tl.float32), scale)
    return scale, tl.where(finite, inverse, float("nan"))


@triton.jit
def _load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k):
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_m + columns.to(tl.int64)[None, :] * stride_k
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def amax_kernel(
    x_ptr, amax_ptr, amax_t_ptr, M, K, stride_m, stride_k, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """ROWS: of every row to amax and of every column to amax_t, else of all to one element of amax."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = _load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if ROWS:
        if amax_ptr is not None:
            tl.atomic_max(amax_ptr + rows, tl.max(magnitude, axis=1), mask=rows < M, sem="relaxed")
        if amax_t_ptr is not None:
            tl.atomic_max(amax_t_ptr + columns, tl.max(magnitude, axis=0), mask=columns < K, sem="relaxed")
    else:
        tl.atomic_max(amax_ptr, tl.max(tl.max(magnitude, axis=1), axis=0), sem="relaxed")


@triton.jit
def first_amax_kernel(x_ptr, scale_ptr, amax_ptr, inverse_ptr, M, K, stride_m, stride_k, TILE: tl.constexpr):
    """1 / scale to inverse; or, where the scale is 0, the largest magnitude of x to amax."""
    scale = tl.load(scale_ptr)
    if scale > 0:
        if tl.program_id(0) == 0:
            tl.store(inverse_ptr, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))
    else:
        columns_of_tiles = tl.cdiv(K, TILE)
        for tile in range(tl.program_id(0), tl.cdiv(M, TILE) * columns_of_tiles, tl.num_programs(0)):
            rows = (tile // columns_of_tiles) * TILE + tl.arange(0, TILE)
            columns = (tile % columns_of_tiles) * TILE + tl.arange(0, TILE)
            x = _load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k)
            magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            tl.atomic_max(amax_ptr, tl.max(tl.max(magnitude, axis=1), axis=0), sem="relaxed")


@triton.jit
def _store_codes(code, codes_ptr, rows, columns, R, pitch):
    """Every column: those past the end are the padding's zeros."""
    offsets = rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    tl.store(codes_ptr + offsets, code, mask=(rows < R)[:, None])


@triton.jit
def cast_kernel(
    x_ptr, codes_ptr, codes_t_ptr, inverse_ptr, inverse_t_ptr, amax_ptr, amax_t_ptr, scale_ptr,
    M, K, stride_m, stride_k, pitch, pitch_t,
    SCALING: tl.constexpr, GROUP: tl.constexpr, E5M2: tl.constexpr, HARDWARE: tl.constexpr,
    LARGEST_CODE: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """SCALING "delayed": amax_t holds the largest magnitude of x where scale is 0."""
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    rows = row_block * TILE + tl.arange(0, TILE)
    columns = column_block * TILE + tl.arange(0, TILE)
    x = _load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k)

    if SCALING == "tensor" or SCALING == "delayed" or SCALING == "square":
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if SCALING == "tensor":
            scale, inverse = scales_of(tl.load(amax_ptr), LARGEST_CODE, TOP, LEAST, POWER_OF_TWO)
            if (row_block == 0) & (column_block == 0):
                tl.store(inverse_ptr, inverse)
        elif SCALING == "delayed":
            given = tl.load(scale_ptr)
            own, inverse = scales_of(tl.load(amax_t_ptr), LARGEST_CODE, TOP, LEAST, POWER_OF_TWO)
            scale = tl.where(given > 0, given, own)
            largest = tl.max(tl.max(magnitude, axis=1), axis=0)
            if amax_ptr is not None:
                tl.atomic_max(amax_ptr, largest, sem="relaxed")
            # Where a scale was given inverse holds 1 / scale, and the pattern of NaN is above it.
            overflow = (largest >= 0x7F800000) & (given > 0)
            tl.atomic_max(inverse_ptr, 0x7FC00000, mask=overflow, sem="relaxed")
            first = (row_block == 0) & (column_block == 0) & (given <= 0)
            tl.store(inverse_ptr, inverse.to(tl.int32, bitcast=True), mask=first)
        else:
            largest = tl.max(tl.max(magnitude, axis=1), axis=0)
            scale, inverse = scales_of(largest, LARGEST_CODE, TOP, LEAST, POWER_OF_TWO)
            if inverse_ptr is not None:
                tl.store(inverse_ptr + column_block * tl.num_programs(0) + row_block, inverse)
            if inverse_t_ptr is not None:
                tl.store(inverse_t_ptr + row_block * tl.num_programs(1) + column_block, inverse)
        # ptxas 12.8 (Triton 3.6) drops casts of float32 whose bytes then cross threads: integers there.
        SAFE: tl.constexpr = HARDWARE and (codes_t_ptr is None or x_ptr.dtype.element_ty != tl.float32)
        code = encode(x * scale, E5M2, SAFE)
        if codes_ptr is not None:
            _store_codes(code, codes_ptr, rows, columns, M, pitch)
        if codes_t_ptr is not None:
            _store_codes(tl.trans(code), codes_t_ptr, columns, rows, K, pitch_t)
    else:
        if codes_ptr is not None:
            _cast_rows(
                x, codes_ptr, inverse_ptr, amax_ptr, rows, columns, column_block, M, pitch,
                SCALING, GROUP, E5M2, HARDWARE, LARGEST_CODE, TOP, LEAST, POWER_OF_TWO, TILE,
            )  # fmt: skip
        if codes_t_ptr is not None:
            _cast_rows(
                tl.trans(x), codes_t_ptr, inverse_t_ptr, amax_t_ptr, columns, rows, row_block, K, pitch_t,
                SCALING, GROUP, E5M2, HARDWARE, LARGEST_CODE, TOP, LEAST, POWER_OF_TWO, TILE,
            )  # fmt: skip


@triton.jit
def _cast_rows(
    x, codes_ptr, inverse_ptr, amax_ptr, rows, columns, column_block, R, pitch,
    SCALING: tl.constexpr, GROUP: tl.constexpr, E5M2: tl.constexpr, HARDWARE: tl.constexpr,
    LARGEST_CODE: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One tile whose groups are parts of rows: the whole row, or GROUP of its elements."""
    if SCALING == "row":
        pattern = tl.load(amax_ptr + rows, mask=rows < R, other=0)
        scale, inverse = scales_of(pattern, LARGEST_CODE, TOP, LEAST, POWER_OF_TWO)
        if column_block == 0:
            tl.store(inverse_ptr + rows, inverse, mask=rows < R)
        y = x * scale[:, None]
    else:
        GROUPS: tl.constexpr = TILE // GROUP
        grouped = tl.reshape(x, (TILE, GROUPS, GROUP))
        pattern = tl.max(grouped.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
        scale, inverse = scales_of(pattern, LARGEST_CODE, TOP, LEAST, POWER_OF_TWO)
        number = column_block * GROUPS + tl.arange(0, GROUPS)
        offsets = number.to(tl.int64)[None, :] * R + rows[:, None]
        tl.store(inverse_ptr + offsets, inverse, mask=(rows < R)[:, None])
        y = tl.reshape(grouped * scale[:, :, None], (TILE, TILE))
    _store_codes(encode(y, E5M2, HARDWARE), codes_ptr, rows, columns, R, pitch)


def has_exact_cast(x: Tensor) -> bool:
    """Whether the processor's cast to FP8 rounds once: Hopper and Blackwell."""
    return capability(x)[0] >= 9


def padded(size: int) -> int:
    """Elements of a row of codes."""
    return -(-size // TILE) * TILE


def empty_operand(x: Tensor, recipe: Recipe, weight: bool, transposed: bool) -> Operand:
    """Memory for the codes of x (M, K), or of its transpose, and for their inverse scales, group-major."""
    rows, columns = (x.shape[1], x.shape[0]) if transposed else (x.shape[0], x.shape[1])
    pitch = padded(columns)
    groups = {"tensor": (1, 1), "row": (1, rows), "mx": (pitch // 32, rows)}.get(recipe.scaling)
    if groups is None:
        groups = pitch // TILE, (-(-rows // TILE) if weight else rows)
    return Operand(x.new_empty((rows, pitch), dtype=torch.uint8), x.new_empty(groups, dtype=torch.float32))


def encoding(x: Tensor, dtype: torch.dtype, recipe: Recipe, hardware: bool | None = None) -> dict[str, Any]:
    """The constants of `encode` and `scales_of` for codes of this dtype on x's device."""
    return {
        "E5M2": dtype == torch.float8_e5m2,
        "HARDWARE": has_exact_cast(x) if hardware is None else hardware,
        "LARGEST_CODE": LARGEST[dtype],
        "TOP": TOP_EXPONENT[dtype],
        "LEAST": LEAST_AMAX[dtype],
        "POWER_OF_TWO": recipe.power_of_two,
    }


Maxima = tuple[Tensor | None, Tensor | None]


def _maxima(sizes: tuple[int, int], known: Maxima) -> Maxima | None:
    """Those that are known, as patterns; None where one that is wanted is not."""
    found = [
        held.view(torch.int32) if size and held is not None and held.numel() == size else None
        for held, size in zip(known, sizes, strict=True)
    ]
    missing = any(size and held is None for held, size in zip(found, sizes, strict=True))
    return None if missing else (found[0], found[1])


def _search(x: Tensor, sizes: tuple[int, int], grid: tuple[int, int], by_row: bool) -> Maxima:
    """By a pass over x."""
    first, second = (torch.zeros(n, dtype=torch.int32, device=x.device) if n else None for n in sizes)
    M, K = x.shape
    launch(amax_kernel, grid, x, first, second, M, K, *x.stride(), ROWS=by_row, TILE=TILE, num_warps=WARPS)
    return first, second


def cast(
    x: Tensor,
    dtype: torch.dtype,
    recipe: Recipe,
    plain: Operand | None,
    transposed: Operand | None,
    *,
    weight: bool = False,
    scale: Tensor | None = None,
    amax: Tensor | None = None,
    hardware: bool | None = None,
    known: Maxima = (None, None),
) -> None:
    """Quantise x into the layouts that are given.

    Args:
        x: (M, K), any strides.
        dtype: of the codes.
        plain, transposed: of `empty_operand`. With one scale a tensor, transposed.inverse is plain's too.
        scale: one float32 element, of delayed scaling; 0 stands for none yet, and x's own is used.
        amax: one float32 element that is raised to x's largest magnitude, where one scale serves a tensor.
        hardware: whether the processor casts; by default where its cast is exact.
        known: largest magnitudes, float32, of whoever wrote x: of all of it, or of its rows and of its
            columns. Where every one that is needed is there, x is read once.
    """
    M, K = x.shape
    grid = (triton.cdiv(M, TILE), triton.cdiv(K, TILE))
    inverse = None if plain is None else plain.inverse
    inverse_t = None if transposed is None else transposed.inverse
    maxima: Maxima = (None, None)
    scaling = "delayed" if scale is not None else recipe.scaling
    if scaling == "block" and weight:
        scaling = "square"
    if scaling == "delayed":
        assert scale is not None
        inverse = inverse if inverse is not None else inverse_t
        assert inverse is not None
        first = torch.zeros(1, dtype=torch.int32, device=x.device)
        programs = min(grid[0] * grid[1], FIRST_PROGRAMS)
        launch(
            first_amax_kernel, (programs,), x, scale, first, inverse, M, K, *x.stride(), TILE=TILE,
            num_warps=WARPS,
        )  # fmt: skip
        maxima = (None if amax is None else amax.view(torch.int32), first)
        inverse = inverse.view(torch.int32)
    elif scaling in ("tensor", "row"):
        by_row = scaling == "row"
        sizes = (M if plain is not None else 0, K if transposed is not None else 0) if by_row else (1, 0)
        maxima = _maxima(sizes, known) or _search(x, sizes, grid, by_row)
    if scaling == "tensor":
        inverse = inverse if inverse is not None else inverse_t
        if amax is not None and maxima[0] is not None:
            patterns = amax.data.view(torch.int32)  # .data: see linear_fp8_cpu.through_fp8
            torch.maximum(patterns, maxima[0], out=patterns)
    constants = encoding(x, dtype, recipe, hardware) | {
        "SCALING": scaling,
        "GROUP": 32 if scaling == "mx" else TILE,
    }
    codes, codes_t = (None if operand is None else operand.codes for operand in (plain, transposed))
    pitches = (0 if held is None else held.shape[1] for held in (codes, codes_t))
    launch(
        cast_kernel, grid, x, codes, codes_t, inverse, inverse_t, *maxima, scale, M, K, *x.stride(), *pitches,
        **constants, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip
    if scaling in ("tensor", "delayed") and plain is not None and transposed is not None:
        transposed.inverse.copy_(plain.inverse)
