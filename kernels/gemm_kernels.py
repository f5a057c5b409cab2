r"""The two kernels of a matrix product, one epilogue, and the ordered sum of partial results.

    forward     output = dropout(act(a @ b + bias)) + residual,           z = a @ b + bias
                row_sum = sums of a's rows, whose steps of K the programs of a block row share
    backward    output = dropout'(a @ b) * act'(z),   h = dropout(act(z)), partial = column sums of output

`tile_kernel` computes one tile a program and loads through pointers: any strides, any architecture.
`persistent_kernel` keeps one program a multiprocessor, walks tiles, and loads through tensor descriptors, so
that the next tile's loads overlap this one's epilogue; it needs rows 16 bytes apart. Both order programs in
groups, so that neighbours share rows of a and columns of b, and both accumulate in float32.
Dropout draws number row * N + column of Philox (philox.py): backward draws it again, nothing is stored.
"""

from __future__ import annotations

from fusekit.kernels._triton import tl, triton


@triton.jit
def _place(tile, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Block row and block column of the tile-th tile: GROUP block rows at a time, column after column."""
    group = tile // (GROUP * blocks_n)
    group_rows = min(blocks_m - group * GROUP, GROUP)
    within = tile % (GROUP * blocks_n)
    return group * GROUP + within % group_rows, within // group_rows


@triton.jit
def _dropout_scale(seed_ptr, seed_offset, dropout, number):
    """1 / (1 - dropout) where the element is kept, else 0; number counts elements row by row."""
    kept = tl.rand(tl.load(seed_ptr) + seed_offset, number) >= dropout
    return tl.where(kept, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _finish(
    accumulator, rows, columns, block_m, M, N, output_ptr, bias_ptr, residual_ptr, z_ptr, h_ptr, partial_ptr,
    seed_ptr, seed_offset, dropout, stride_om, stride_on, stride_rm, stride_rn,
    ACT: tl.constexpr, DACT: tl.constexpr, Z_SCALE: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile. Offsets are 64 bits wide: they may pass 2^31 elements."""
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    wide_rows, wide_columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    offsets = wide_rows * stride_om + wide_columns * stride_on
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    scale = 1.0
    if seed_ptr is not None:
        scale = _dropout_scale(seed_ptr, seed_offset, dropout, wide_rows * N + wide_columns)
    if DACT is not None:
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if Z_SCALE != 1.0:
            z *= 1.0 / Z_SCALE
        output = DACT(accumulator * scale, z)
        if partial_ptr is not None:
            total = tl.sum(tl.where(mask, output, 0.0), axis=0)
            tl.store(partial_ptr + block_m.to(tl.int64) * N + columns, total, mask=columns < N)
        if h_ptr is not None:
            h = ACT(z) * scale
            tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)
    else:
        if z_ptr is not None:
            z = accumulator if Z_SCALE == 1.0 else accumulator * Z_SCALE
            tl.store(z_ptr + offsets, z.to(z_ptr.dtype.element_ty), mask=mask)
        output = ACT(accumulator) * scale
        if residual_ptr is not None:
            residual = wide_rows * stride_rm + wide_columns * stride_rn
            output += tl.load(residual_ptr + residual, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish_in_parts(
    accumulator, rows, column, block_m, M, N, output_ptr, bias_ptr, residual_ptr, z_ptr, h_ptr, partial_ptr,
    seed_ptr, seed_offset, dropout, stride_om, stride_on, stride_rm, stride_rn,
    ACT: tl.constexpr, DACT: tl.constexpr, Z_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """PARTS halves the columns until an epilogue's operands fit beside the accumulator in registers."""
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    columns = column + tl.arange(0, WIDTH)
    if PARTS == 1:
        _finish(
            accumulator, rows, columns, block_m, M, N, output_ptr, bias_ptr, residual_ptr, z_ptr, h_ptr,
            partial_ptr, seed_ptr, seed_offset, dropout, stride_om, stride_on, stride_rm, stride_rn,
            ACT, DACT, Z_SCALE,
        )  # fmt: skip
    else:
        halves = tl.permute(tl.reshape(accumulator, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish_in_parts(
            left, rows, column, block_m, M, N, output_ptr, bias_ptr, residual_ptr, z_ptr, h_ptr,
            partial_ptr, seed_ptr, seed_offset, dropout, stride_om, stride_on, stride_rm, stride_rn,
            ACT, DACT, Z_SCALE, BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip
        _finish_in_parts(
            right, rows, column + BLOCK_N // 2, block_m, M, N, output_ptr, bias_ptr, residual_ptr, z_ptr,
            h_ptr, partial_ptr, seed_ptr, seed_offset, dropout, stride_om, stride_on, stride_rm, stride_rn,
            ACT, DACT, Z_SCALE, BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip


@triton.jit
def _add_row_sums(sums, a_ptr, rows, step, block_n, blocks_n, M, K, stride_am, stride_ak,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """sums + one step of K of a's rows, where it is this block column's turn; the sum over K comes last.

    a is loaded again, by then from the L2 cache: with one load for the product and for the sum, Triton (3.6,
    3.8) gives the loop one buffer less, and overwrites what an unfinished wgmma still reads.
    """
    if step % blocks_n == block_n:
        depth = step * BLOCK_K + tl.arange(0, BLOCK_K)
        offsets = rows.to(tl.int64)[:, None] * stride_am + depth.to(tl.int64)[None, :] * stride_ak
        a = tl.load(a_ptr + offsets, mask=(rows < M)[:, None] & (depth < K)[None, :], other=0.0)
        sums += a.to(tl.float32)
    return sums


@triton.jit
def _store_row_sums(sums, row_sum_ptr, rows, plane, M):
    tl.store(row_sum_ptr + plane.to(tl.int64) * M + rows, tl.sum(sums, axis=1), mask=rows < M)


@triton.jit(do_not_specialize=["seed_offset"])
def tile_kernel(
    a_ptr, b_ptr, output_ptr, bias_ptr, residual_ptr, z_ptr, h_ptr, partial_ptr, seed_ptr, row_sum_ptr,
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, stride_rm, stride_rn,
    seed_offset, dropout,
    ACT: tl.constexpr, DACT: tl.constexpr, Z_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m, block_n = _place(tl.program_id(0), blocks_m, blocks_n, GROUP)

    # Rows and columns past the end wrap around instead of being masked: the loop stays free of predicates,
    # and what they compute is not stored.
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)

    steps = tl.cdiv(K, BLOCK_K)
    first, last = 0, steps
    if SPLITS > 1:
        per_split = tl.cdiv(steps, SPLITS)
        first = tl.program_id(1) * per_split
        last = min(first + per_split, steps)

    start = (first * BLOCK_K + depth).to(tl.int64)
    a_ptrs = a_ptr + (rows % M).to(tl.int64)[:, None] * stride_am + start[None, :] * stride_ak
    b_ptrs = b_ptr + start[:, None] * stride_bk + (columns % N).to(tl.int64)[None, :] * stride_bn
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for step in range(first, last):
        if row_sum_ptr is not None:
            sums = _add_row_sums(
                sums, a_ptr, rows, step, block_n, blocks_n, M, K, stride_am, stride_ak, BLOCK_K
            )
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = depth < K - step * BLOCK_K
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk

    if row_sum_ptr is not None:
        _store_row_sums(sums, row_sum_ptr, rows, tl.program_id(1) * blocks_n + block_n, M)
    if SPLITS > 1:
        output_ptr += tl.program_id(1).to(tl.int64) * M * N
    _finish_in_parts(
        accumulator, rows, block_n * BLOCK_N, block_m, M, N, output_ptr, bias_ptr, residual_ptr, z_ptr, h_ptr,
        partial_ptr, seed_ptr, seed_offset, dropout, stride_om, stride_on, stride_rm, stride_rn,
        ACT, DACT, Z_SCALE, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seed_offset"])
def persistent_kernel(
    a_ptr, b_ptr, output_ptr, bias_ptr, residual_ptr, z_ptr, h_ptr, partial_ptr, seed_ptr, row_sum_ptr,
    M, N, K, stride_a, stride_b, stride_om, stride_on, stride_rm, stride_rn, seed_offset, dropout,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
    ACT: tl.constexpr, DACT: tl.constexpr, Z_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, SPECIALISE: tl.constexpr,
):  # fmt: skip
    """A_ROWS: a's rows are contiguous, else its columns; B_ROWS the same of b. stride_*: of the other way."""
    if A_ROWS:
        a = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_a.to(tl.int64), 1], [BLOCK_M, BLOCK_K])
    else:
        a = tl.make_tensor_descriptor(a_ptr, [K, M], [stride_a.to(tl.int64), 1], [BLOCK_K, BLOCK_M])
    if B_ROWS:
        b = tl.make_tensor_descriptor(b_ptr, [K, N], [stride_b.to(tl.int64), 1], [BLOCK_K, BLOCK_N])
    else:
        b = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_b.to(tl.int64), 1], [BLOCK_N, BLOCK_K])
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles = blocks_m * blocks_n
    steps = tl.cdiv(K, BLOCK_K)
    per_split = tl.cdiv(steps, SPLITS)
    for number in tl.range(
        tl.program_id(0), tiles * SPLITS, tl.num_programs(0), flatten=False, warp_specialize=SPECIALISE
    ):
        split = number // tiles
        block_m, block_n = _place(number % tiles, blocks_m, blocks_n, GROUP)
        row, column = block_m * BLOCK_M, block_n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        first = split * per_split
        for step in range(first, min(first + per_split, steps)):
            if row_sum_ptr is not None:
                sums = _add_row_sums(
                    sums, a_ptr, rows, step, block_n, blocks_n, M, K, stride_a if A_ROWS else 1,
                    1 if A_ROWS else stride_a, BLOCK_K,
                )  # fmt: skip
            k = step * BLOCK_K
            left = a.load([row, k]) if A_ROWS else a.load([k, row]).T
            right = b.load([k, column]) if B_ROWS else b.load([column, k]).T
            accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
        if row_sum_ptr is not None:
            _store_row_sums(sums, row_sum_ptr, rows, split * blocks_n + block_n, M)
        plane_ptr = output_ptr + split.to(tl.int64) * M * N
        _finish_in_parts(
            accumulator, rows, column, block_m, M, N, plane_ptr, bias_ptr, residual_ptr, z_ptr, h_ptr,
            partial_ptr, seed_ptr, seed_offset, dropout, stride_om, stride_on, stride_rm, stride_rn,
            ACT, DACT, Z_SCALE, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip


@triton.jit
def _sum_columns(partial_ptr, total_ptr, block, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (columns < N)[None, :]
        offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
        total += tl.sum(tl.load(partial_ptr + offsets, mask=mask, other=0.0), axis=0)
    tl.store(total_ptr + columns, total.to(total_ptr.dtype.element_ty), mask=columns < N)


@triton.jit
def sum_kernel(
    partial_ptr, total_ptr, second_ptr, second_total_ptr, P, N, second_P, second_N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Two sums, of P planes of N numbers each, share a launch: the first programs make the first."""
    block = tl.program_id(0)
    if second_ptr is None:
        _sum_columns(partial_ptr, total_ptr, block, P, N, BLOCK_P, BLOCK_N)
    else:
        blocks = tl.cdiv(N, BLOCK_N)
        if block < blocks:
            _sum_columns(partial_ptr, total_ptr, block, P, N, BLOCK_P, BLOCK_N)
        else:
            _sum_columns(second_ptr, second_total_ptr, block - blocks, second_P, second_N, BLOCK_P, BLOCK_N)
