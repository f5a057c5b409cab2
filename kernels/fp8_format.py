r"""FP8 in plain PyTorch: groups, scales, codes. It defines what every other path computes, bit for bit.

An operand is seen as (rows, contraction) and cut into groups of (R, C) elements. For a group of largest
magnitude amax:

    scale   = largest power of two with amax * scale <= largest    (or largest / amax, IEEE division)
    code    = round to nearest even (clamp(x * scale)), in float32
    value   = code / scale

largest is 448 of e4m3 and 57344 of e5m2, both 1.75 * 2^k, so the power of two follows from amax's bits
alone. amax = 0 has scale 1; scales stop at 2^100, so that code / scale stays a normal number of bfloat16.
With groups of 1 x 32 these are the e8m0 scales of Microscaling with the exponent rounded up (RCEIL).

A NaN or an infinity in a group: e4m3 has no infinity, and saturating one would hide it. Such a group keeps
scale 1 and gets the inverse scale NaN, so that all which reads it becomes NaN, on every device, and a loss
scaler sees it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.kernels.recipe import LARGEST, Recipe

TOP_EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # largest = 1.75 * 2^this
LARGEST_SCALE = 2.0**100
MX_GROUP, BLOCK_GROUP = 32, 128

_MANTISSA = 0x007FFFFF
_THREE_QUARTERS = 0x00600000  # the mantissa of 1.75


class Operand(NamedTuple):
    """(rows, contraction) codes, and the float32 factor of each group: value = code * inverse."""

    codes: Tensor
    inverse: Tensor


def group_of(recipe: Recipe, shape: tuple[int, int], weight: bool = False) -> tuple[int, int]:
    """Rows and columns of a group of an operand of this (rows, contraction) shape."""
    rows, columns = (max(size, 1) for size in shape)
    if recipe.scaling == "tensor":
        return rows, columns
    if recipe.scaling == "row":
        return 1, columns
    if recipe.scaling == "mx":
        return 1, MX_GROUP
    return BLOCK_GROUP if weight else 1, BLOCK_GROUP


def amax_of(x: Tensor, group: tuple[int, int]) -> Tensor:
    """(row groups, column groups) float32 largest magnitudes; NaN where a group has one."""
    rows, columns = x.shape
    x = x.detach().float().abs()
    below, right = -rows % group[0], -columns % group[1]
    if below or right:
        x = torch.nn.functional.pad(x, (0, right, 0, below))
    return x.view(-(-rows // group[0]), group[0], -(-columns // group[1]), group[1]).amax((1, 3))


def scale_of(amax: Tensor, dtype: torch.dtype, power_of_two: bool = True) -> Tensor:
    """The float32 scale that multiplies a group before the cast; 1 where amax is 0 or not finite."""
    if power_of_two:
        bits = amax.clamp(min=LARGEST[dtype] / LARGEST_SCALE).view(torch.int32)
        exponent = (bits >> 23) + ((bits & _MANTISSA) > _THREE_QUARTERS).int()
        scale = ((254 + TOP_EXPONENT[dtype] - exponent) << 23).view(torch.float32)
    else:
        # A number over a tensor is number * reciprocal in torch: two roundings.
        scale = torch.full_like(amax, LARGEST[dtype]).div(amax).clamp(max=LARGEST_SCALE)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def used_scale(
    amax: Tensor, dtype: torch.dtype, power_of_two: bool = True, given: Tensor | None = None
) -> Tensor:
    """The delayed scale of a group where one is `given`; the group's own where none is, or where it is 0."""
    own = scale_of(amax, dtype, power_of_two)
    return own if given is None else torch.where(given > 0, given.float(), own)


def inverse_of(scale: Tensor, amax: Tensor) -> Tensor:
    """What multiplies a code; NaN where the group had a NaN or an infinity."""
    return torch.where(amax.isfinite(), 1.0 / scale, torch.full_like(scale, torch.nan))


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to nearest even, saturating; NaN stays."""
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def spread(groups: Tensor, group: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """One value a group as one value an element."""
    rows, columns = groups.shape
    wide = groups[:, None, :, None].expand(rows, group[0], columns, group[1])
    return wide.reshape(rows * group[0], columns * group[1])[: shape[0], : shape[1]]


def quantise(
    x: Tensor,
    dtype: torch.dtype,
    group: tuple[int, int],
    power_of_two: bool = True,
    scale: Tensor | None = None,
) -> Operand:
    """The codes and inverse scales of x.

    Args:
        x: (rows, contraction), floating; float64 is rounded to float32 first.
        dtype: of the codes.
        group: rows and columns that share a scale.
        power_of_two: see the head of this file.
        scale: one element, of earlier steps, instead of x's own; larger values then saturate. 0 stands for
            none: no step has been seen yet.
    """
    rows, columns = (int(size) for size in x.shape)
    if not x.numel():
        groups = (-(-rows // group[0]), -(-columns // group[1]))
        return Operand(torch.empty_like(x, dtype=dtype), x.new_ones(groups, dtype=torch.float32))
    amax = amax_of(x, group)
    used = used_scale(amax, dtype, power_of_two, scale)
    codes = encode(x.detach().float() * spread(used, group, (rows, columns)), dtype)
    return Operand(codes, inverse_of(used, amax))


def dequantise(operand: Operand, group: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The values of the codes, in a dtype that may be wider than float32."""
    rows, columns = operand.codes.shape
    return operand.codes.float().to(dtype) * spread(operand.inverse, group, (rows, columns)).to(dtype)
