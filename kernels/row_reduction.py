"""What kernels over whole rows share: tiling, spreading rows over programs, summing column partials.

A kernel that reads M rows once and needs sums over all rows (a norm's weight gradients) keeps one float32
partial row per program; `reduce_partials` adds them up in a fixed order. No atomics, so the result is bitwise
the same run to run.
Shape suffixes: M rows, N columns, P programs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.launch import launch, on_gpu, recording

MAX_COLUMNS = 8192  # 8 elements a thread in the largest program; with 16 the backward kernels spill registers
MAX_ODD_COLUMNS = 4096  # wider unaligned rows take more registers for addresses and spill them
PIPELINE_BYTES = 96 << 10  # shared memory a program may hold: fits every GPU since sm_80


class RowPlan(NamedTuple):
    """How M rows are tiled and spread: tile sizes, loads in flight, warps of a program, programs."""

    BLOCK_M: int
    BLOCK_N: int
    NUM_STAGES: int
    num_warps: int
    programs: int


def row_plan(rows: Tensor, streams: int, per_multiprocessor: int) -> RowPlan:
    """Tiles of whole rows, 8 elements a thread (16 bytes of 16-bit data), looped over by few programs.

    Few, because every program reads the weights once, and in a backward pass writes a partial row that is
    read back: at 8192 rows of 4096 columns in bfloat16 the 132 programs of an H100 add 4 % to the bytes of a
    LayerNorm backward, twice as many would add 9 %. Loads issued ahead make up for the fewer warps.

    Args:
        rows: (M, N), the largest tensor read.
        streams: how many tensors like it are read.
        per_multiprocessor: programs that share a multiprocessor.
    """
    M, N = rows.shape
    width = multiprocessors(rows)
    BLOCK_N = max(16, 1 << (N - 1).bit_length())
    most = max(1, M // width)  # smaller tiles where there are too few rows for every multiprocessor
    BLOCK_M = min(max(1, 4096 // BLOCK_N), 1 << (most.bit_length() - 1))
    NUM_STAGES = max(1, min(3, PIPELINE_BYTES // (BLOCK_M * BLOCK_N * rows.element_size() * streams)))
    num_warps = min(32, max(4, BLOCK_M * BLOCK_N // 256))
    return RowPlan(BLOCK_M, BLOCK_N, NUM_STAGES, num_warps, min(-(-M // BLOCK_M), width * per_multiprocessor))


def as_rows(x: Tensor) -> Tensor:
    """x (..., N) as (M, N) with unit column stride: a view where the strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Streaming multiprocessors of x's GPU; an H100's 132 where launches are recorded or run on a CPU."""
    present = torch.cuda.is_available() and not recording()
    return _multiprocessors(x.device.index or 0) if present else 132


@triton.jit
def _reduce_kernel(
    first_ptr, second_ptr, first_out_ptr, second_out_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        mask = (row[:, None] < P) & (column[None, :] < N)
        offset = row[:, None] * N + column[None, :]
        if first_ptr is not None:
            first += tl.load(first_ptr + offset, mask=mask, other=0.0)
        if second_ptr is not None:
            second += tl.load(second_ptr + offset, mask=mask, other=0.0)
    if first_ptr is not None:
        total = tl.sum(first, 0)
        tl.store(first_out_ptr + column, total.to(first_out_ptr.dtype.element_ty), mask=column < N)
    if second_ptr is not None:
        total = tl.sum(second, 0)
        tl.store(second_out_ptr + column, total.to(second_out_ptr.dtype.element_ty), mask=column < N)


def reduce_partials(partials: Sequence[Tensor | None], outs: Sequence[Any]) -> None:
    """Add up float32 partials (P, N) over P into outs (N,), both in one launch; None is skipped."""
    present = next((p for p in partials if p is not None), None)
    if present is None:
        return
    P, N = present.shape
    launch(_reduce_kernel, (-(-N // 32),), *partials, *outs, P, N, num_warps=4, BLOCK_P=32, BLOCK_N=32)


CHUNK = 1 << 17  # elements; 512 KiB of float32, a core's second-level cache


def row_chunks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Rows (M, N) or (M,) of all tensors, a few at a time, the first not None; for widening them on the CPU.

    One pass per chunk costs 2.9 ms where a chunk fits the cache and 3.7 where it is everything (LayerNorm
    backward, 2048 x 768 bfloat16, one thread).
    """
    first = next(t for t in tensors if t is not None)
    size = max(1, -(-len(first) // max(1, -(-first.numel() // CHUNK))))
    return zip(*(repeat(None) if t is None else t.split(size) for t in tensors), strict=False)


def widened(rows: Tensor, buffer: Tensor) -> Tensor:
    """rows in float32: themselves, or a copy in the buffer. The caller must not write to it."""
    return rows if rows.dtype == torch.float32 else buffer[: len(rows)].copy_(rows)


def unsupported_rows(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> str | None:
    """Why no norm over x's last dimension can take these, as a sentence."""
    if x.dim() == 0 or x.shape[-1] == 0:
        return f"x of shape {tuple(x.shape)} has no last dimension to normalise"
    if on_gpu(x) and x.shape[-1] > MAX_COLUMNS:
        return f"{x.shape[-1]} columns exceed the {MAX_COLUMNS} of a row that one program can hold"
    if on_gpu(x) and x.shape[-1] > MAX_ODD_COLUMNS and x.shape[-1] % 16:
        return f"{x.shape[-1]} columns, of which there may be {MAX_ODD_COLUMNS} where 16 does not divide them"
    if residual is not None and residual.shape != x.shape:
        return f"residual {tuple(residual.shape)} and x {tuple(x.shape)} differ in shape; expand the smaller"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype} and x {x.dtype}; cast one to the other's dtype"
    return None if weight is None else unsupported_parameter(x, "weight", weight)


def unsupported_parameter(x: Tensor, name: str, parameter: Tensor) -> str | None:
    """Why a norm of x cannot take this weight or bias, as a sentence."""
    if parameter.shape != x.shape[-1:]:
        return f"{name} {tuple(parameter.shape)} is not one number for each of the {x.shape[-1]} columns"
    if parameter.dtype not in (x.dtype, torch.float32):
        return f"{name} is {parameter.dtype} where x is {x.dtype}; {name} must have x's dtype or be float32"
    return None


class Draw:
    """Random sample tensors that require a gradient, the same for every device and dtype.

    Values are multiples of 1/16 below 8, so that the sum of two is exact in bfloat16: otherwise the rounding
    of h = x + residual, which is part of the op, hides errors of its norm.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, shift: float = 0.0) -> Tensor:
        # Large benchmark inputs repeat 64 rows: drawing them all takes seconds.
        few = tuple(min(size, 64) for size in shape[:-1]) + shape[-1:]
        values = torch.randn(few, generator=self.generator).add_(shift)
        values = values.mul_(16).round_().clamp_(-127, 127).div_(16)
        repeats = tuple(-(-size // max(1, some)) for size, some in zip(shape, few, strict=True))
        values = values.to(self.device, dtype or self.dtype).repeat(repeats)
        return values[tuple(map(slice, shape))].contiguous().requires_grad_()

    def strided(self, *shape: int) -> Tensor:
        """Rows cut out of longer ones."""
        return self(*shape[:-1], shape[-1] + 5).detach()[..., : shape[-1]].requires_grad_()
