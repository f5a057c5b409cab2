"""What kernels over whole rows share: tiling, spreading rows over programs, summing column partials.

A kernel that reads M rows once and needs sums over all rows (a norm's weight gradients) keeps one float32
partial row per program; `reduce_partials` adds them up in a fixed order. No atomics, so the result is bitwise
the same run to run.
Shape suffixes: M rows, N columns, P programs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.launch import launch, on_gpu, recording

MAX_COLUMNS = 32768  # a forward row of 32 elements a thread in the largest program, 32 warps


class RowTile(NamedTuple):
    """Rows and columns of a program's tile and the warps that hold it."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


@functools.cache
def row_tile(N: int) -> RowTile:
    """A tile of whole rows, 8 elements a thread (one 16-byte access of 16-bit data) up to 8192 columns."""
    BLOCK_N = max(8, 1 << (N - 1).bit_length())
    BLOCK_M = max(1, 1024 // BLOCK_N)
    return RowTile(BLOCK_M, BLOCK_N, min(32, max(4, BLOCK_M * BLOCK_N // 256)))


def as_rows(x: Tensor) -> Tensor:
    """x (..., N) as (M, N) with unit column stride: a view where the strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Streaming multiprocessors of x's GPU; an H100's 132 where launches are only recorded."""
    return 132 if recording() else _multiprocessors(x.device.index or 0)


def program_count(blocks: int, x: Tensor) -> int:
    """Programs that share `blocks` row blocks: one per multiprocessor, more where each still gets 64 blocks.

    Every program costs a partial row written and read back. At 8192 rows of 4096 columns in bfloat16 the 132
    of an H100 add 4 % to the bytes of a LayerNorm backward, twice as many would add 9 %.
    """
    width = multiprocessors(x)
    return min(blocks, width * max(1, min(4, blocks // (64 * width))))


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


def reduce_partials(partials: tuple[Tensor | None, Tensor | None], outs: tuple[Any, Any]) -> None:
    """Add up float32 partials (P, N) over P into outs (N,), both in one launch; None is skipped."""
    present = next((p for p in partials if p is not None), None)
    if present is None:
        return
    P, N = present.shape
    launch(_reduce_kernel, (-(-N // 32),), *partials, *outs, P, N, num_warps=4, BLOCK_P=32, BLOCK_N=32)


def row_chunks(M: int, N: int, elements: int = 1 << 19) -> list[slice]:
    """Slices over M rows that the CPU widens to float32 a few at a time: nearly equal, `elements` or fewer.

    2 MiB of float32 stay in the last-level cache; with chunks of a tenth of that, the calls cost more than
    the memory they save (LayerNorm backward, 2048 x 768 bfloat16, one thread: 3.5 ms against 1.8).
    """
    rows = -(-M // max(1, -(-M * N // elements)))
    return [slice(start, start + rows) for start in range(0, M, max(1, rows))]


def unsupported_rows(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> str | None:
    """Why no norm over x's last dimension can take these, as a sentence."""
    if x.dim() == 0 or x.shape[-1] == 0:
        return f"x of shape {tuple(x.shape)} has no last dimension to normalise"
    if on_gpu(x) and x.shape[-1] > MAX_COLUMNS:
        return f"{x.shape[-1]} columns exceed the {MAX_COLUMNS} of a row held by one program"
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
