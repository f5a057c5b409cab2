"""Global tokens beside a window: the blocks that hold one, and the blocks that a program visits.

A block of queries visits the keys of its window, then, in their order, the blocks elsewhere that hold a
global key; one that holds a global query visits every block. Blocks of keys visit queries likewise. What is
kept of a batch element are two numbers a block: memory grows with the length, and not with its square.

Beltagy et al. 2020, "Longformer", arXiv:2004.05150; Zaheer et al. 2020, "Big Bird", arXiv:2007.14062.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.attention_tiles import keys_seen, queries_seeing, within
from fusekit.kernels.launch import launch

ELEMENTS = 4096  # that a program looks at at a time


def global_blocks(flags: Tensor, block: int) -> Tensor:
    """(B, 2 blocks + 1) int32 of flags (B, T), bytes: how many blocks before each, and before the end, hold a
    flag; then the numbers of those that do, and whatever was in memory."""
    (B, T), blocks = flags.shape, triton.cdiv(flags.shape[1], block)
    found = torch.empty((B, 2 * blocks + 1), dtype=torch.int32, device=flags.device)
    launch(
        _global_blocks_kernel, (B,),
        flags, found, flags.stride(0), T, BLOCK=block, CHUNK=max(1, ELEMENTS // block),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return found


@triton.jit
def _global_blocks_kernel(flags_ptr, found_ptr, stride_b, T, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    blocks = tl.cdiv(T, BLOCK)
    batch = tl.program_id(0).to(tl.int64)
    flags_ptr += batch * stride_b
    found_ptr += batch * (2 * blocks + 1)
    count = 0
    for start in tl.range(0, blocks, CHUNK, num_stages=1):
        block = start + tl.arange(0, CHUNK)
        t = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        flags = tl.load(flags_ptr + t, mask=t < T, other=0).to(tl.int32)
        holds = (tl.max(flags, 1) != 0).to(tl.int32)
        before = count + tl.cumsum(holds, 0) - holds
        tl.store(found_ptr + block, before, mask=block < blocks)
        tl.store(found_ptr + blocks + 1 + before, block, mask=holds != 0)
        count += tl.sum(holds, 0)
    tl.store(found_ptr + blocks, count)


@triton.jit
def keys_visited(
    first, last, block, batch, m, Tq, Tk, high, flags_ptr, found_ptr, ranges_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr, GLOBALS: tl.constexpr,
):  # fmt: skip
    """`_visits` of a block of queries, whose window is first to last."""
    reach = high if GLOBALS == 1 else 1073741824
    far_first, far_last = keys_seen(block, Tk, -1073741824, reach, BLOCK_M, BLOCK_N, 2)
    if DOCUMENTS:
        far_first, far_last = within(
            far_first, far_last, ranges_ptr, batch, block, tl.cdiv(Tq, BLOCK_M), BLOCK_N
        )
    flags = tl.load(flags_ptr + m, mask=m < Tq, other=0).to(tl.int32)
    is_global = tl.max(flags, 0) != 0
    return _visits(first, last, far_first, far_last, is_global, found_ptr, batch, Tk, BLOCK_N)


@triton.jit
def queries_visited(
    first, last, block, batch, n, Tq, Tk, high, flags_ptr, found_ptr, ranges_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr, GLOBALS: tl.constexpr,
):  # fmt: skip
    """`_visits` of a block of keys, which the windows of the queries from first to last reach."""
    reach = high if GLOBALS == 1 else 1073741824
    far_first, far_last = queries_seeing(block, Tq, -1073741824, reach, BLOCK_M, BLOCK_N, 2)
    if DOCUMENTS:
        far_first, far_last = within(
            far_first, far_last, ranges_ptr, batch, block, tl.cdiv(Tk, BLOCK_N), BLOCK_M
        )
    flags = tl.load(flags_ptr + n, mask=n < Tk, other=0).to(tl.int32)
    is_global = tl.max(flags, 0) != 0
    return _visits(first, last, far_first, far_last, is_global, found_ptr, batch, Tq, BLOCK_M)


@triton.jit
def _visits(first, last, far_first, far_last, is_global, found_ptr, batch, T, BLOCK: tl.constexpr):
    """(first, last, end, list, left, jump) of a program: blocks from first to last, then those that `visited`
    finds in the list up to `end`, all in rows. Nothing is visited outside of far_first to far_last.

    found_ptr: of what `global_blocks` gives of the (B, T) flags of what is visited.
    """
    blocks = tl.cdiv(T, BLOCK)
    found_ptr += batch.to(tl.int64) * (2 * blocks + 1)
    far_first = tl.minimum(far_first // BLOCK, blocks)
    far_last = tl.maximum(tl.cdiv(far_last, BLOCK), far_first)
    first = tl.where(is_global, far_first, tl.minimum(tl.maximum(first // BLOCK, far_first), far_last))
    last = tl.where(is_global, far_last, tl.minimum(tl.maximum(tl.cdiv(last, BLOCK), first), far_last))
    start = tl.load(found_ptr + far_first)
    left = tl.load(found_ptr + first) - start
    jump = tl.load(found_ptr + last) - tl.load(found_ptr + first)
    end = last + tl.load(found_ptr + far_last) - start - jump
    return first * BLOCK, last * BLOCK, end * BLOCK, found_ptr + blocks + 1 + start, left, jump


@triton.jit
def visited(step, last, list_ptr, left, jump, BLOCK: tl.constexpr):
    """The row at which the block of a step starts: `left` listed blocks are in front of the window, `jump` in
    it."""
    place = (step - last) // BLOCK
    place += tl.where(place < left, 0, jump)
    return tl.where(step < last, step, tl.load(list_ptr + place, mask=step >= last, other=0) * BLOCK)
