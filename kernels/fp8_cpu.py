r"""FP8 and back in one sweep over blocks that stay in cache, without codes: what a CPU multiplies.

With a scale of a power of two nothing needs scaling. In float32, for e the power of two below |x|, at least
that of the smallest normal code, and m bits of mantissa,

    Q(x) = (x + 1.5 * 2^(23 - m) * e) - 1.5 * 2^(23 - m) * e

rounds to nearest even at 2^-m e: the addition does it. Both are fused multiply-adds, exact but for that one
rounding. 2 million elements of bfloat16 with their amax take 1.7 ms (one thread of an AVX-512 processor),
a cast to float8 and back 9 ms. Signs of zeros are lost, as no product sees them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels.fp8_format import inverse_of, spread, used_scale
from fusekit.kernels.recipe import LARGEST

BLOCK = 1 << 18  # elements: 1 MiB of float32. 2^16 and 2^21 are 45 % and 20 % slower
LARGEST_AMAX = 2.0**100  # above it e overflows on the way: scaled first

_MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
_SMALLEST_NORMAL = {torch.float8_e4m3fn: 2.0**-6, torch.float8_e5m2: 2.0**-14}
_PATTERNS = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
}


def amax_of(x: Tensor, group: tuple[int, int]) -> Tensor:
    """As fp8_format.amax_of, by integer maxima of the patterns: NaN > infinity > finite."""
    rows, columns = x.shape
    integer, mask = _PATTERNS[x.dtype]
    patterns = x.detach().view(integer)
    found = [_group_maxima(patterns[i] & mask, group) for i in _blocks(rows, columns, group[0])]
    largest = torch.cat(found) if len(found) > 1 else found[0]
    if group[0] >= rows:
        largest = largest.amax(0, keepdim=True)
    return largest.view(x.dtype).float()


def _group_maxima(patterns: Tensor, group: tuple[int, int]) -> Tensor:
    rows, columns = patterns.shape
    if group[1] >= columns:
        patterns = patterns.amax(1, keepdim=True)
    elif group[1] > 1:
        whole = columns // group[1] * group[1]
        parts = [patterns[:, :whole].view(rows, -1, group[1]).amax(2)]
        if whole < columns:
            parts.append(patterns[:, whole:].amax(1, keepdim=True))
        patterns = torch.cat(parts, 1)
    if group[0] == 1:
        return patterns
    return torch.cat([part.amax(0, keepdim=True) for part in patterns.split(group[0])])


def _blocks(rows: int, columns: int, group_rows: int) -> list[slice]:
    """Rows that are swept at once: whole groups, unless one group has all rows."""
    step = max(1, BLOCK // max(columns, 1))
    if 1 < group_rows < rows:
        step = max(group_rows, step // group_rows * group_rows)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def through_fp8(
    x: Tensor, code: torch.dtype, group: tuple[int, int], dtype: torch.dtype, power_of_two: bool = True,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dequantise(quantise(x)) of fp8_format, bit for bit but for signs of zeros, and the amax of the groups.

    The values are laid out as x where x or its transpose is contiguous, else contiguous.

    Args:
        x: (R, C) float32, float16 or bfloat16, any strides.
        code: the FP8 dtype in between.
        group: rows and columns that share a scale.
        dtype: of the result; bfloat16 holds it exactly where power_of_two is True.
        power_of_two, scale: as of fp8_format.quantise.
    """
    if x.stride(1) != 1 and x.stride(0) == 1:
        scale = None if scale is None else scale.t()  # one a group, or a single one
        turned, amax = through_fp8(x.t(), code, (group[1], group[0]), dtype, power_of_two, scale)
        return turned.t(), amax.t()
    x = x.contiguous()
    rows, columns = x.shape
    output = torch.empty(x.shape, dtype=dtype)
    if not x.numel():
        return output, torch.zeros(-(-rows // group[0]), -(-columns // group[1]))
    amax = amax_of(x, group)
    used = used_scale(amax, code, power_of_two, scale)
    inverse = inverse_of(used, amax)
    scaled = not power_of_two or bool((amax > LARGEST_AMAX).any())
    limits = None if scale is None else LARGEST[code] if scaled else LARGEST[code] * inverse
    smallest = (
        torch.full_like(inverse, _SMALLEST_NORMAL[code]) if scaled else _SMALLEST_NORMAL[code] * inverse
    )
    _sweep(x, output, group, code, smallest, limits, (used, inverse) if scaled else None)
    return output, amax


def _sweep(
    x: Tensor,
    output: Tensor,
    group: tuple[int, int],
    code: torch.dtype,
    smallest: Tensor,
    limits: Tensor | float | None,
    scales: tuple[Tensor, Tensor] | None,
) -> None:
    rows, columns = x.shape
    alpha = 1.5 * 2.0 ** (23 - _MANTISSA_BITS[code])
    blocks = _blocks(rows, columns, group[0])
    wide = torch.empty(blocks[0].stop, columns)
    power = torch.empty(wide.shape, dtype=torch.int32)
    for i in blocks:
        size = i.stop - i.start
        w, e = wide[:size], power[:size]
        e_float = e.view(torch.float32)
        w.copy_(x[i])
        if scales is not None:
            w.mul_(_of_block(scales[0], group, i, x.shape))
        if limits is not None:
            limit = (
                _of_block(limits, group, i, x.shape) if isinstance(limits, Tensor) else torch.tensor(limits)
            )
            w.clamp_(-limit, limit)
        torch.bitwise_and(w.view(torch.int32), 0x7F800000, out=e)
        torch.maximum(e_float, _of_block(smallest, group, i, x.shape), out=e_float)
        w.add_(e_float, alpha=alpha).sub_(e_float, alpha=alpha)
        if scales is not None:
            w.mul_(_of_block(scales[1], group, i, x.shape))
        output[i] = w


def _of_block(groups: Tensor, group: tuple[int, int], rows: slice, shape: torch.Size) -> Tensor:
    """The groups' values for these rows of x, broadcast where they can be, else one an element."""
    if group[0] >= shape[0]:
        part, height = groups, 1
    else:
        part, height = groups[rows.start // group[0] : -(-rows.stop // group[0])], group[0]
    if height == 1 and (group[1] == 1 or group[1] >= shape[1]):
        return part
    width = 1 if group[1] >= shape[1] else group[1]
    columns = shape[1] if group[1] < shape[1] else 1
    return spread(part, (height, width), (rows.stop - rows.start if height > 1 else len(part), columns))
