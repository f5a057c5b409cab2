r"""What `attention_fp8` rounds, in plain PyTorch: q, k and v by groups, P by itself.

q, k and v go through e4m3 as fp8_format.py has it, with scales of powers of two: nearest even, saturating.
One scale serves

    head     a head of a batch element, all its tokens
    block    128 tokens of it

An infinity or a NaN stands for itself: it becomes the code NaN, and the group's scale follows from the finite
numbers. As in the attention that is not quantised, only rows that see it become NaN.

P needs no scale that anyone remembers. With S in units of log2 and base = ceil(rowmax S) - 8, the largest of
E = 2^(S - base) lies in (128, 256], of e4m3's 448, and R(E) rounds it. A base is a whole number: another one
multiplies E by a power of two, which rounding does not notice but below 2^-14 of the largest, where e4m3 is
subnormal. So R(E) does not depend on how a kernel cuts the keys into blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusekit.kernels import fp8_format
from fusekit.kernels.fp8_cpu import through_fp8

CODE = torch.float8_e4m3fn
BLOCK = 128  # tokens that share a scale of "block"
HEADROOM = 8  # E's largest element is at most 2^8


def groups(T: int, scaling: str) -> int:
    """Scales of one head of T tokens."""
    return -(-T // BLOCK) if scaling == "block" else 1


def values(x: Tensor, scaling: str) -> Tensor:
    """x (B, H, T, D) behind e4m3, by definition; in float32, or in x's dtype where that is wider."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def rounded(rows: Tensor) -> Tensor:
        group = (1, rows.shape[1])
        return fp8_format.dequantise(fp8_format.quantise(rows, CODE, group), group, wide)

    return _by_group(x, scaling, rounded)


def values_cpu(x: Tensor, scaling: str) -> Tensor:
    """The same in x's dtype, which holds it exactly, in one sweep that stays in cache."""
    return _by_group(x, scaling, lambda rows: through_fp8(rows, CODE, (1, rows.shape[1]), x.dtype)[0])


def _by_group(x: Tensor, scaling: str, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Every group of x as a row, rounded."""
    B, H, T, D = x.shape
    if not x.numel():
        return rounded(x.reshape(0, 1)).view(x.shape)
    finite = x.detach().isfinite()
    whole = bool(finite.all())
    given = x.detach() if whole else torch.where(finite, x.detach(), 0.0)
    count = groups(T, scaling)
    if count * BLOCK > T and scaling == "block":
        given = torch.nn.functional.pad(given, (0, 0, 0, count * BLOCK - T))
    found = rounded(given.reshape(B * H * count, -1)).view(B, H, -1, D)[:, :, :T].contiguous()
    return found if whole else torch.where(finite, found, torch.nan)


def round_p(e: Tensor) -> Tensor:
    """R(E) in E's dtype; E is at most 256."""
    if e.dtype != torch.float32:
        return fp8_format.encode(e.float(), CODE).to(e.dtype)
    # Adding 2^20 times the power of two below E leaves 3 bits of mantissa: the addition rounds.
    power = (e.view(torch.int32) & 0x7F800000).view(torch.float32)
    magic = power.clamp_(min=2.0**-6).mul_(2.0**20)
    return (e + magic).sub_(magic)
