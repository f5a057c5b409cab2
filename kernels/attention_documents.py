"""Documents of packed batches: numbers from cumulative lengths, and where a block's documents are.

`attention` compares documents score by score; what it skips are the keys in front of the first and behind
the last whose number lies between the smallest and the largest of a block of queries. That is right for
numbers in any order, and skips all that can be skipped where documents lie one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.launch import launch

CHUNK = 1024  # numbers that a program compares at a time


def document_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """The document of each of `total` tokens that lie one after the other, as attention's `documents`.

    Args:
        cu_seqlens: (documents + 1,) int32 or int64, as FlashAttention's varlen functions take them: document
            i is tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. Empty documents are allowed.
        total: how many tokens there are. What comes before cu_seqlens[0] or from cu_seqlens[-1] on is a
            document of its own (padding).

    Returns:
        (total,) int32, on the device of cu_seqlens, without waiting for it.

    Raises:
        ValueError: cu_seqlens has another shape or dtype.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"document_ids: cu_seqlens {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype} is no vector of int32 "
            "or int64; pass the cumulative lengths, [0, 5, 9] for documents of 5 and 4 tokens"
        )
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True)


def ranges(ours: Tensor, theirs: Tensor, block: int) -> Tensor:
    """(B, blocks, 2) int32: the first of `theirs` (B, T) that may equal one of a block of `ours`, and the one
    behind the last."""
    B, blocks = ours.shape[0], triton.cdiv(ours.shape[1], block)
    found = torch.empty((B, blocks, 2), dtype=torch.int32, device=ours.device)
    launch(
        _range_kernel, (B * blocks,),
        ours, theirs, found, ours.stride(0), theirs.stride(0), ours.shape[1], theirs.shape[1],
        BLOCK=block, CHUNK=CHUNK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return found


@triton.jit
def _range_kernel(
    ours_ptr, theirs_ptr, ranges_ptr, stride_ob, stride_tb, OURS, THEIRS,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(OURS, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ours = tl.load(
        ours_ptr + batch * stride_ob + tl.minimum(i, OURS - 1)
    )  # the last repeated changes nothing
    lowest, highest = tl.min(ours, 0), tl.max(ours, 0)
    theirs_ptr += batch * stride_tb
    first = tl.full((CHUNK,), 0, tl.int32) + THEIRS
    last = tl.zeros((CHUNK,), tl.int32)
    for start in tl.range(0, THEIRS, CHUNK, num_stages=1):
        j = start + tl.arange(0, CHUNK)
        theirs = tl.load(theirs_ptr + j, mask=j < THEIRS, other=0)
        near = (j < THEIRS) & (theirs >= lowest) & (theirs <= highest)
        first = tl.minimum(first, tl.where(near, j, THEIRS))
        last = tl.maximum(last, tl.where(near, j + 1, 0))
    ranges_ptr += tl.program_id(0) * 2
    tl.store(ranges_ptr, tl.min(first, 0))
    tl.store(ranges_ptr + 1, tl.max(last, 0))
