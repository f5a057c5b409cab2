r"""Products of FP8 values with exact sums: the same bits for any order of summation, so on any machine.

Every value is an integer times its quantum, the value of its last significant bit. If q is the least
quantum of a row times that of a column, each partial sum of their products is a multiple of q and, by
Cauchy-Schwarz, at most |row| |column|: where that is below 2^53 q, float64 holds all of them and no
addition rounds. e4m3 times e4m3 always fits for up to 2^17 terms. Where ranges are wider (e5m2, scales of
groups), the few smallest elements of one operand are multiplied apart, and two exact sums are added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT64_BITS = 53
SIGNIFICANT_BITS = 4  # of e4m3; e5m2 has 3
_INFINITY = 0x7F800000  # the pattern of float32's


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float64, from float32 (M, K) and (K, N) of at most 4 significant bits an element."""
    if not (a.numel() and b.numel()):
        return a.double() @ b.double()
    spans = [_span(a, 1), _span(b, 0)]
    if sum(spans) <= FLOAT64_BITS:  # -inf of zeros, and of a NaN, which no sum hides
        return a.double() @ b.double()
    missing = math.ceil(sum(spans)) - FLOAT64_BITS
    if spans[0] < spans[1]:
        return exact_product(b.t(), a.t()).t()
    # Elements from here on have a quantum that is 2^missing times the least one.
    limit = 2.0 ** (math.log2(_quantum(a)) + missing + SIGNIFICANT_BITS - 1)
    is_small = (a.abs() < limit) & (a != 0)
    rows = is_small.any(1).nonzero()[:, 0]
    total = exact_product(a.masked_fill(is_small, 0.0), b)
    total[rows] += exact_product(torch.where(is_small[rows], a[rows], 0.0), b)
    return total


def _span(x: Tensor, dim: int) -> float:
    """Bits from the least quantum to the largest norm of x's rows (dim 1) or columns; -inf of zeros, NaN."""
    quantum = _quantum(x)
    # A norm along strided elements is 50 times slower than one along neighbours.
    squares = (x.norm(dim=dim).square() if x.stride(dim) == 1 else x.square().sum(dim)).max().item()
    if not (0 < quantum < math.inf and 2.0**-100 < squares < math.inf):
        squares = x.double().square().sum(dim).max().item()
    if not (0 < quantum < math.inf and 0 < squares < math.inf):
        return -math.inf
    return 0.5 * math.log2(squares) + 1e-3 - math.log2(quantum)  # the sum itself is rounded


def _quantum(x: Tensor) -> float:
    """The value of the last significant bit of the element where that is least; inf where all are zero."""
    # In the order of memory: elements of a transposed tensor are slow to pick.
    x = (x.t() if x.stride(0) == 1 else x).reshape(-1)
    # A pattern less one, without its sign, puts zeros last.
    patterns = (x.view(torch.int32) & 0x7FFFFFFF).sub_(1).bitwise_and_(0x7FFFFFFF)
    least_pattern = int(patterns.min().item())
    if least_pattern >= _INFINITY - 1:
        return math.inf
    # The last bits of elements from 16 times the least on are above its own.
    limit = min(least_pattern + (SIGNIFICANT_BITS << 23), _INFINITY - 1)
    near = patterns[patterns < limit].add_(1).view(torch.float32).double()
    step = 2.0 ** (math.floor(math.log2(near.min().item())) - SIGNIFICANT_BITS + 1)
    while not bool(((near / (2 * step)).frac() != 0).any()):
        step *= 2
    return step
