r"""Rotary position embedding of rows, with or without an RMSNorm in front: what rope.py and rms_norm_rope.py
share. Kernels: rotation_kernels.py; on a CPU: rotation_cpu.py.

A row is one head's features at one position. Pairs (a, b) of its first `rotary` features are turned,

    y_a = a cos_a - b sin_a,   y_b = b cos_b + a sin_b        and back: a cos_a + b sin_b, b cos_b - a sin_a

the rest pass through. Feature i pairs with i + rotary / 2 (halves), or 2 i with 2 i + 1 (interleaved).
Tables hold one number a feature, or one a pair; two features of a pair may have different ones.
Rows are numbered in the order in which they lie in memory, whatever the order of x's dimensions, so
neighbours are read together, and the heads of a position share the table's rows in the cache.
Shapes: x (..., D) with up to three leading dimensions; cos and sin broadcast to them, (..., rotary) or
(..., rotary / 2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels._triton import triton
from fusekit.kernels.launch import launch, on_gpu
from fusekit.kernels.op import not_runnable
from fusekit.kernels.rotation_kernels import backward_kernel, forward_kernel
from fusekit.kernels.row_reduction import multiprocessors, reduce_partials

MAX_FEATURES = 256  # of a head; a program holds whole rows
MAX_LEADING = 3
TILE = 2048  # features a program of 4 warps holds, 16 a thread


class Rows(NamedTuple):
    """x's leading dimensions, outermost in memory first, as three sizes (ones in front)."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        n0, n1, n2 = self.sizes
        return n0 * n1 * n2

    def strides(self, t: Tensor) -> tuple[int, ...]:
        """t's strides in this order, 0 where it is broadcast, and that of its last dimension."""
        lead = t.dim() - 1 - len(self.order)  # negative: dimensions that t lacks
        found = [t.stride(d + lead) if d + lead >= 0 and t.shape[d + lead] != 1 else 0 for d in self.order]
        return (*[0] * (MAX_LEADING - len(found)), *found, t.stride(-1))


def rows_of(x: Tensor) -> Rows:
    order = sorted(range(x.dim() - 1), key=lambda d: -x.stride()[d])
    return Rows(tuple(order), (*[1] * (MAX_LEADING - len(order)), *(x.shape[d] for d in order)))


def dense(x: Tensor, order: tuple[int, ...] | list[int]) -> Tensor:
    """Uninitialised, of x's shape, its dimensions packed in this order with the features innermost."""
    packed = x.new_empty([x.shape[d] for d in order] + [x.shape[-1]])
    return packed.permute(*(order.index(d) for d in range(len(order))), -1)


def dense_like(x: Tensor) -> Tensor:
    """Uninitialised, in x's order: empty_like, but the same for empty and for fake tensors."""
    return dense(x, rows_of(x).order)


def _blocks(x: Tensor, rotary: int, tile: int = TILE) -> dict[str, Any]:
    D = x.shape[-1]
    pairs, rest = triton.next_power_of_2(rotary // 2), D - rotary
    passing = triton.next_power_of_2(rest) if rest else 0
    return {
        "BLOCK_M": max(1, tile // triton.next_power_of_2(2 * pairs + passing)), "BLOCK_R": pairs,
        "BLOCK_P": passing, "num_warps": 4,
    }  # fmt: skip


def rotate_gpu(
    x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, rotary: int, interleaved: bool, *,
    back: bool = False, norm: tuple[Tensor | None, float, float] | None = None,
) -> None:  # fmt: skip
    """Turn x's rows into y, or back; `norm` (weight, eps, offset) in front of it."""
    rows, blocks = rows_of(x), _blocks(x, rotary)
    weight, eps, offset = norm or (None, 0.0, 0.0)
    sin = _like_strides(sin, cos)
    launch(
        forward_kernel, (triton.cdiv(rows.total, blocks["BLOCK_M"]),), x, cos, sin,
        None if weight is None else weight.contiguous(), y,
        *rows.strides(x), *rows.strides(cos), *rows.strides(y)[:-1],
        rows.total, *rows.sizes[1:], x.shape[-1], rotary, eps, offset,
        NORM=norm is not None, BACK=back, INTERLEAVED=interleaved, SHARED=cos.shape[-1] != rotary, **blocks,
    )  # fmt: skip


def norm_backward_gpu(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, dx: Tensor | None,
    dweight: Tensor | None, rotary: int, interleaved: bool, eps: float, offset: float,
) -> None:  # fmt: skip
    """The gradient through rotation and norm; that of the weight by partial rows, added up in order."""
    rows, blocks = rows_of(x), _blocks(x, rotary, TILE // 2)  # twice the rows spill, interleaved
    programs = min(triton.cdiv(rows.total, blocks["BLOCK_M"]), 4 * multiprocessors(x))
    partials = None if dweight is None else x.new_empty((programs, x.shape[-1]), dtype=torch.float32)
    sin = _like_strides(sin, cos)
    launch(
        backward_kernel, (programs,), dy, x, cos, sin,
        None if weight is None else weight.contiguous(), dx, partials,
        *rows.strides(dy), *rows.strides(x), *rows.strides(cos),
        *(rows.strides(dx)[:-1] if dx is not None else (0, 0, 0)),
        rows.total, *rows.sizes[1:], x.shape[-1], rotary, eps, offset,
        INTERLEAVED=interleaved, SHARED=cos.shape[-1] != rotary, **blocks,
    )  # fmt: skip
    reduce_partials((partials, None), (dweight, None))


def _like_strides(sin: Tensor, cos: Tensor) -> Tensor:
    """sin where it lies as cos does, so that one offset serves both; else a copy that does."""
    return sin if sin.stride() == cos.stride() else torch.empty_like(cos).copy_(sin)


def pairs_of(t: Tensor, rotary: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the two features of every pair; of half a table, the table twice."""
    if t.shape[-1] < rotary:
        return t, t
    if interleaved:
        return t[..., 0:rotary:2], t[..., 1:rotary:2]
    return t[..., : rotary // 2], t[..., rotary // 2 : rotary]


def turned_features(cos: Tensor, rotary: int | None) -> int:
    """rotary, or where it is None as many as the tables have columns."""
    return rotary if rotary is not None else cos.shape[-1] if cos.dim() else 0


def rotated(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool) -> Tensor:
    """The definition, in x's dtype."""
    a, b = pairs_of(x, rotary, interleaved)
    (cos_a, cos_b), (sin_a, sin_b) = (pairs_of(t.to(x.dtype), rotary, interleaved) for t in (cos, sin))
    y_a, y_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    turned = torch.stack((y_a, y_b), -1).flatten(-2) if interleaved else torch.cat((y_a, y_b), -1)
    return torch.cat((turned, x[..., rotary:]), -1) if rotary < x.shape[-1] else turned


def unsupported(x: Tensor, cos: Tensor, sin: Tensor, rotary: int | None, weight: Tensor | None) -> str | None:
    """Why no row of x can be turned by these tables, as a sentence."""
    if not 2 <= x.dim() <= MAX_LEADING + 1:
        return f"x has {x.dim()} dimensions, not 2 to {MAX_LEADING + 1}, of which the last holds features"
    if cos.dim() == 0 or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return f"cos {_kind(cos)} and sin {_kind(sin)} differ, or hold no features"
    D, width = x.shape[-1], cos.shape[-1]
    turned = width if rotary is None else rotary
    if turned < 2 or turned % 2 or turned > D:
        return f"{turned} rotary features are no even number from 2 to the {D} of x"
    if width not in (turned, turned // 2):
        return f"tables of {width} columns are neither one a feature nor one a pair of {turned} features"
    sizes = zip(reversed(cos.shape[:-1]), reversed(x.shape[:-1]), strict=False)
    if cos.dim() > x.dim() or any(size not in (1, wanted) for size, wanted in sizes):
        return f"cos {tuple(cos.shape)} does not broadcast to x {tuple(x.shape)}"
    if cos.requires_grad or sin.requires_grad:
        return "cos and sin need a gradient, which this kernel does not compute; learned tables stay unfused"
    if on_gpu(x) and D > MAX_FEATURES:
        return f"{D} features exceed the {MAX_FEATURES} of a row that one program can hold"
    return not_runnable(x, weight, cos, sin)


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{tuple(t.shape)}"
