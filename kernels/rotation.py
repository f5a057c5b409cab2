r"""Rotary position embedding of rows, with or without an RMSNorm in front: kernels that rope.py and
rms_norm_rope.py share.

A row is one head's features at one position. Pairs (a, b) of its first `rotary` features are turned,

    y_a = a cos_a - b sin_a,   y_b = b cos_b + a sin_b        and back: a cos_a + b sin_b, b cos_b - a sin_a

the rest pass through. Feature i pairs with i + rotary / 2 (halves), or 2 i with 2 i + 1 (interleaved).
Tables hold one number a feature, or one a pair; two features of a pair may have different ones.
Rows are numbered in the order in which they lie in memory, whatever the order of x's dimensions, so
neighbours are read together, and the heads of a position share the table's rows in the cache.
Shapes: x (..., D) with up to three leading dimensions; cos and sin broadcast to them, (..., rotary) or
(..., rotary / 2). M rows, BLOCK_R pairs, BLOCK_P features that pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.launch import launch, on_gpu
from fusekit.kernels.op import not_runnable
from fusekit.kernels.row_reduction import multiprocessors, reduce_partials

MAX_FEATURES = 256  # of a head; a program holds whole rows
MAX_LEADING = 3
TILE = 2048  # features a program of 4 warps holds, 16 a thread


@triton.jit
def _row_offset(row, n1, n2, s0, s1, s2):
    """Where row number `row` starts: its three indices times the strides, in 64 bits."""
    outer = row // n2
    i0, i1, i2 = (outer // n1).to(tl.int64), (outer % n1).to(tl.int64), (row % n2).to(tl.int64)
    return (i0 * s0 + i1 * s1 + i2 * s2)[:, None]


@triton.jit
def _load_pairs(ptr, start, column_stride, present, R, INTERLEAVED: tl.constexpr, SHARED: tl.constexpr,
                BLOCK_R: tl.constexpr):  # fmt: skip
    """The pairs of rows in float32; SHARED: one number for both, as half a table has."""
    pair = tl.arange(0, BLOCK_R)[None, :]
    if SHARED:
        a = tl.load(ptr + start + pair * column_stride, mask=present & (pair < R // 2), other=0.0)
        b = a
    elif INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_R)[None, :]
        both = tl.load(ptr + start + column * column_stride, mask=present & (column < R), other=0.0)
        a, b = tl.split(tl.reshape(both, (both.shape[0], BLOCK_R, 2)))
    else:
        mask = present & (pair < R // 2)
        a = tl.load(ptr + start + pair * column_stride, mask=mask, other=0.0)
        b = tl.load(ptr + start + (pair + R // 2) * column_stride, mask=mask, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(ptr, start, a, b, present, R, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_R)[None, :]
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * BLOCK_R))
        tl.store(ptr + start + column, both.to(ptr.dtype.element_ty), mask=present & (column < R))
    else:
        pair = tl.arange(0, BLOCK_R)[None, :]
        mask = present & (pair < R // 2)
        tl.store(ptr + start + pair, a.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + start + pair + R // 2, b.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x_ptr, cos_ptr, sin_ptr, weight_ptr, y_ptr,
    x_s0, x_s1, x_s2, x_column, t_s0, t_s1, t_s2, t_column, y_s0, y_s1, y_s2,
    M, n1, n2, D, R, eps, offset,
    NORM: tl.constexpr, BACK: tl.constexpr, INTERLEAVED: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = (row < M)[:, None]
    x_start = _row_offset(row, n1, n2, x_s0, x_s1, x_s2)
    y_start = _row_offset(row, n1, n2, y_s0, y_s1, y_s2)
    t_start = _row_offset(row, n1, n2, t_s0, t_s1, t_s2)
    a, b = _load_pairs(x_ptr, x_start, x_column, present, R, INTERLEAVED, False, BLOCK_R)
    cos_a, cos_b = _load_pairs(cos_ptr, t_start, t_column, present, R, INTERLEAVED, SHARED, BLOCK_R)
    sin_a, sin_b = _load_pairs(sin_ptr, t_start, t_column, present, R, INTERLEAVED, SHARED, BLOCK_R)
    if BLOCK_P > 0:
        column = R + tl.arange(0, BLOCK_P)[None, :]
        passing = tl.load(x_ptr + x_start + column * x_column, mask=present & (column < D), other=0.0)
        rest = passing.to(tl.float32)
    if NORM:
        squares = tl.sum(a * a + b * b, 1)
        if BLOCK_P > 0:
            squares += tl.sum(rest * rest, 1)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / D + eps))[:, None]
        a, b = a * rstd, b * rstd
        if weight_ptr is not None:
            w_a, w_b = _load_pairs(weight_ptr, 0, 1, True, R, INTERLEAVED, False, BLOCK_R)
            a, b = a * (w_a + offset), b * (w_b + offset)
        if BLOCK_P > 0:
            rest *= rstd
            if weight_ptr is not None:
                rest *= tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32) + offset
    if BACK:
        y_a, y_b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        y_a, y_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    _store_pairs(y_ptr, y_start, y_a, y_b, present, R, INTERLEAVED, BLOCK_R)
    if BLOCK_P > 0:
        tl.store(y_ptr + y_start + column, rest.to(y_ptr.dtype.element_ty), mask=present & (column < D))


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, cos_ptr, sin_ptr, weight_ptr, dx_ptr, dweight_ptr,
    dy_s0, dy_s1, dy_s2, dy_column, x_s0, x_s1, x_s2, x_column, t_s0, t_s1, t_s2, t_column,
    dx_s0, dx_s1, dx_s2, M, n1, n2, D, R, eps, offset,
    INTERLEAVED: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    column = R + tl.arange(0, BLOCK_P if BLOCK_P > 0 else 1)[None, :]
    if weight_ptr is not None:
        w_a, w_b = _load_pairs(weight_ptr, 0, 1, True, R, INTERLEAVED, False, BLOCK_R)
        w_a, w_b = w_a + offset, w_b + offset
        if BLOCK_P > 0:
            w_rest = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32) + offset
    dw_a = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dw_b = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if BLOCK_P > 0:
        dw_rest = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        present = (row < M)[:, None]
        dy_start = _row_offset(row, n1, n2, dy_s0, dy_s1, dy_s2)
        x_start = _row_offset(row, n1, n2, x_s0, x_s1, x_s2)
        t_start = _row_offset(row, n1, n2, t_s0, t_s1, t_s2)
        dy_a, dy_b = _load_pairs(dy_ptr, dy_start, dy_column, present, R, INTERLEAVED, False, BLOCK_R)
        cos_a, cos_b = _load_pairs(cos_ptr, t_start, t_column, present, R, INTERLEAVED, SHARED, BLOCK_R)
        sin_a, sin_b = _load_pairs(sin_ptr, t_start, t_column, present, R, INTERLEAVED, SHARED, BLOCK_R)
        g_a, g_b = dy_a * cos_a + dy_b * sin_b, dy_b * cos_b - dy_a * sin_a
        a, b = _load_pairs(x_ptr, x_start, x_column, present, R, INTERLEAVED, False, BLOCK_R)
        squares = tl.sum(a * a + b * b, 1)
        if BLOCK_P > 0:
            mask = present & (column < D)
            g_rest = tl.load(dy_ptr + dy_start + column * dy_column, mask=mask, other=0.0).to(tl.float32)
            rest = tl.load(x_ptr + x_start + column * x_column, mask=mask, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, 1)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / D + eps))[:, None]
        a, b = a * rstd, b * rstd
        dw_a += g_a * a
        dw_b += g_b * b
        if weight_ptr is not None:
            g_a, g_b = g_a * w_a, g_b * w_b
        projection = tl.sum(g_a * a + g_b * b, 1)
        if BLOCK_P > 0:
            rest *= rstd
            dw_rest += g_rest * rest
            if weight_ptr is not None:
                g_rest *= w_rest
            projection += tl.sum(g_rest * rest, 1)
        if dx_ptr is not None:
            dx_start = _row_offset(row, n1, n2, dx_s0, dx_s1, dx_s2)
            mean = (projection / D)[:, None]
            dx_a, dx_b = rstd * (g_a - a * mean), rstd * (g_b - b * mean)
            _store_pairs(dx_ptr, dx_start, dx_a, dx_b, present, R, INTERLEAVED, BLOCK_R)
            if BLOCK_P > 0:
                dx = rstd * (g_rest - rest * mean)
                tl.store(dx_ptr + dx_start + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        partial = tl.program_id(0) * D
        total_a, total_b = tl.sum(dw_a, 0)[None, :], tl.sum(dw_b, 0)[None, :]
        _store_pairs(dweight_ptr, partial, total_a, total_b, True, R, INTERLEAVED, BLOCK_R)
        if BLOCK_P > 0:
            tl.store(dweight_ptr + partial + column, tl.sum(dw_rest, 0)[None, :], mask=column < D)


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
        _forward_kernel, (triton.cdiv(rows.total, blocks["BLOCK_M"]),), x, cos, sin,
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
        _backward_kernel, (programs,), dy, x, cos, sin,
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


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, rotary: int, interleaved: bool, back: bool = False
) -> None:
    """Turn float32 x into out, of its shape; ATen, four passes over half the features."""
    a, b = pairs_of(x, rotary, interleaved)
    out_a, out_b = pairs_of(out, rotary, interleaved)
    (cos_a, cos_b), (sin_a, sin_b) = (pairs_of(t, rotary, interleaved) for t in (cos, sin))
    torch.mul(a, cos_a, out=out_a).addcmul_(b, sin_b if back else sin_a, value=1 if back else -1)
    torch.mul(b, cos_b, out=out_b).addcmul_(a, sin_a if back else sin_b, value=-1 if back else 1)
    if rotary < x.shape[-1]:
        out[..., rotary:].copy_(x[..., rotary:])


CHUNK = 1 << 18  # elements widened at once: 1 MiB of float32


def chunks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views (n0, n1, n2, features) of a part of x's rows in memory order, and of what broadcasts to it."""
    rows = rows_of(x)
    _, n1, n2 = rows.sizes

    def ordered(t: Tensor) -> Tensor:
        permuted = t.expand(*x.shape[:-1], t.shape[-1]).permute(*rows.order, -1)
        return permuted.view(*[1] * (MAX_LEADING - len(rows.order)), *permuted.shape)

    views = [ordered(t) for t in (x, *others)]
    whole = max(1, n1 * n2 * x.shape[-1])
    if whole <= CHUNK:
        yield from zip(*(v.split(CHUNK // whole) for v in views), strict=True)
    else:
        for outer in zip(*(v.split(1) for v in views), strict=True):
            step = max(1, CHUNK * n1 // whole)
            yield from zip(*(v.split(step, 1) for v in outer), strict=True)


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
