r"""The tail: eight more bits of attention's output than its dtype holds, kept for the backward pass alone.

dS = P (dP - delta) takes its mean out of each row of dP, with delta = rowsum(P dP) = rowsum(dy * y). Where
values have a part in common, delta is large next to what it leaves; with y rounded to 16 bits a share of that
mean stays in dS, and where keys have a part in common as well, it adds up in dq instead of cancelling. In
tests/gpu/test_attention_tail.py dq is 105 to 425 rounding floors off; softmax and products one by one are 11
to 16 off, and dq 11 to 13 with the tail. (On a CPU the backward pass computes y again.)

That holds for weights P that add up to one as they meet v: the kernel sums them rounded, by a product.

The tail is int8: the bits of y in float32 less those of y rounded, in steps of 2^8 for bfloat16 and of 2^5
for float16, so that both together have 16 and 19 bits of significand. y is rounded to nearest, at most half
of a step of its own away: 128 of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.op import LOW_PRECISION

# What a forward pass is asked for. IF_OWN: by our kernels alone, as a library has nothing to tell; then it
# depends on who computes whether there is one. In a graph that is traced shapes must not: GIVEN, zeros if so.
NONE, GIVEN, IF_OWN = 0, 1, 2


def wanted(q: Tensor) -> int:
    """What the forward pass of a training step asks for."""
    return IF_OWN if type(q) in (Tensor, torch.nn.Parameter) else GIVEN


def empty(q: Tensor, v: Tensor, tail: int) -> Tensor:
    """Memory for it, (B, Tq, H, DV) in the layout of the output, before dimensions are swapped; no elements
    where none is asked for, or needed: float32, and everything on a CPU."""
    if tail == NONE or q.dtype not in LOW_PRECISION or not on_gpu(q):
        return q.new_empty(0, dtype=torch.int8)
    B, H, Tq, _ = q.shape
    return q.new_empty((B, Tq, H, v.shape[-1]), dtype=torch.int8)


def of_library(q: Tensor, v: Tensor, tail: int) -> Tensor:
    """Where a library gave y as it rounded it."""
    return empty(q, v, GIVEN if tail == GIVEN else NONE).zero_()


def given(tail: Tensor) -> Tensor | None:
    """As the backward kernels take it."""
    return tail if tail.numel() else None


@triton.jit
def cut_off(exact, rounded):
    """exact (float32) less rounded (16 bits), in bits below those of rounded."""
    STEP: tl.constexpr = 8 if rounded.dtype == tl.bfloat16 else 5
    bits = exact.to(tl.int32, bitcast=True) - rounded.to(tl.float32).to(tl.int32, bitcast=True)
    bits = (bits + (1 << (STEP - 1))) >> STEP
    return tl.minimum(tl.maximum(bits, -128), 127).to(tl.int8)


@triton.jit
def rejoined(rounded, tail):
    """The float32 that was cut in two."""
    STEP: tl.constexpr = 8 if rounded.dtype == tl.bfloat16 else 5
    bits = rounded.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits + (tail.to(tl.int32) << STEP)).to(tl.float32, bitcast=True)
