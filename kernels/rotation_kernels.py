"""Kernels of rotary position embedding over rows, with or without an RMSNorm in front; see rotation.py.

M rows, BLOCK_R pairs, BLOCK_P features that pass.
"""

from __future__ import annotations

from fusekit.kernels._triton import tl, triton


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
def forward_kernel(
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
def backward_kernel(
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
