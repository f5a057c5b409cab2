r"""The two products of three linear layers with one input, each in one launch.

    columns     q, k, v = x @ w_q.T + b_q,  x @ w_k.T + b_k,  x @ w_v.T + b_v
    sum         grad_x = dq @ w_q + dk @ w_k + dv @ w_v

`columns`: the column blocks of q, k and v follow each other, and a program's block says which weight it
reads. Programs are ordered as in gemm_kernels.py, a few block rows through all three, so x comes from memory
once.
`sum`: one accumulator over the three, rounded once.

`tile_*` load through pointers, `persistent_*` through tensor descriptors. The choice among the weights is
made in front of the loop: with a loop for each, Triton gives each its own shared memory, more than there is,
and ptxas serialises the products.
"""

from __future__ import annotations

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.activations import none_forward
from fusekit.kernels.gemm_kernels import _finish_in_parts, _place


@triton.jit
def _store(
    accumulator, rows, column, M, N, output_ptr, bias_ptr, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    _finish_in_parts(
        accumulator, rows, column, 0, M, N, output_ptr, bias_ptr, None, None, None, None, None, 0, 0.0,
        stride_om, 1, 0, 0, none_forward, None, 1.0, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


@triton.jit
def _add_product(
    accumulator, a_ptr, b_ptr, rows, columns, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """accumulator + a @ b. Rows and columns past the end wrap around: what they compute is not stored."""
    depth = tl.arange(0, BLOCK_K)
    start = depth.to(tl.int64)
    a_ptrs = a_ptr + (rows % M).to(tl.int64)[:, None] * stride_am + start[None, :] * stride_ak
    b_ptrs = b_ptr + start[:, None] * stride_bk + (columns % N).to(tl.int64)[None, :] * stride_bn
    for step in range(0, tl.cdiv(K, BLOCK_K)):
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
    return accumulator


@triton.jit
def _load_bias(bias, bias_ptr, columns, N):
    """The bias of these columns, or `bias` where there is none."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    return bias


@triton.jit
def tile_columns_kernel(
    x_ptr, wq_ptr, wk_ptr, wv_ptr, q_ptr, k_ptr, v_ptr, bq_ptr, bk_ptr, bv_ptr,
    M, NQ, NK, NV, K, stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    blocks_q = tl.cdiv(NQ, BLOCK_N)
    blocks_k = tl.cdiv(NK, BLOCK_N)
    blocks = blocks_q + blocks_k + tl.cdiv(NV, BLOCK_N)
    block_m, block_n = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), blocks, GROUP)
    is_q, is_k = block_n < blocks_q, block_n < blocks_q + blocks_k
    weight_ptr = tl.where(is_q, wq_ptr, tl.where(is_k, wk_ptr, wv_ptr))
    N = tl.where(is_q, NQ, tl.where(is_k, NK, NV))
    block_n -= tl.where(is_q, 0, tl.where(is_k, blocks_q, blocks_q + blocks_k))
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    accumulator = _add_product(
        accumulator, x_ptr, weight_ptr, rows, columns, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
        PRECISION, EVEN_K, BLOCK_K,
    )  # fmt: skip
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if is_q:
        bias = _load_bias(bias, bq_ptr, columns, NQ)
    elif is_k:
        bias = _load_bias(bias, bk_ptr, columns, NK)
    else:
        bias = _load_bias(bias, bv_ptr, columns, NV)
    output_ptr = tl.where(is_q, q_ptr, tl.where(is_k, k_ptr, v_ptr))
    accumulator += bias[None, :]
    _store(accumulator, rows, block_n * BLOCK_N, M, N, output_ptr, None, N, BLOCK_M, BLOCK_N, PARTS)


@triton.jit
def tile_sum_kernel(
    dq_ptr, dk_ptr, dv_ptr, wq_ptr, wk_ptr, wv_ptr, dx_ptr,
    M, NQ, NK, NV, K, stride_q, stride_k, stride_v, stride_wn, stride_wk,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N is of dx's columns, K of them; BLOCK_K of the sums over NQ, NK and NV features."""
    block_m, block_n = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dx = _add_product(
        dx, dq_ptr, wq_ptr, rows, columns, M, K, NQ, stride_q, 1, stride_wn, stride_wk,
        PRECISION, EVEN_K, BLOCK_K,
    )  # fmt: skip
    dx = _add_product(
        dx, dk_ptr, wk_ptr, rows, columns, M, K, NK, stride_k, 1, stride_wn, stride_wk,
        PRECISION, EVEN_K, BLOCK_K,
    )  # fmt: skip
    dx = _add_product(
        dx, dv_ptr, wv_ptr, rows, columns, M, K, NV, stride_v, 1, stride_wn, stride_wk,
        PRECISION, EVEN_K, BLOCK_K,
    )  # fmt: skip
    _store(dx, rows, block_n * BLOCK_N, M, K, dx_ptr, None, K, BLOCK_M, BLOCK_N, PARTS)


@triton.jit
def _add_descriptor_product(
    accumulator, a, b, row, column, K, B_ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """accumulator + a @ b; B_ROWS: b's rows are contiguous, else its columns."""
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        left = a.load([row, k])
        right = b.load([k, column]) if B_ROWS else b.load([column, k]).T
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def persistent_columns_kernel(
    x_ptr, wq_ptr, wk_ptr, wv_ptr, q_ptr, k_ptr, v_ptr, bq_ptr, bk_ptr, bv_ptr,
    M, NQ, NK, NV, K, stride_x, stride_w,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    x = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_x.to(tl.int64), 1], [BLOCK_M, BLOCK_K])
    wq = tl.make_tensor_descriptor(wq_ptr, [NQ, K], [stride_w.to(tl.int64), 1], [BLOCK_N, BLOCK_K])
    wk = tl.make_tensor_descriptor(wk_ptr, [NK, K], [stride_w.to(tl.int64), 1], [BLOCK_N, BLOCK_K])
    wv = tl.make_tensor_descriptor(wv_ptr, [NV, K], [stride_w.to(tl.int64), 1], [BLOCK_N, BLOCK_K])
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_q = tl.cdiv(NQ, BLOCK_N)
    blocks_k = tl.cdiv(NK, BLOCK_N)
    blocks = blocks_q + blocks_k + tl.cdiv(NV, BLOCK_N)
    for number in tl.range(tl.program_id(0), blocks_m * blocks, tl.num_programs(0), flatten=False):
        block_m, block_n = _place(number, blocks_m, blocks, GROUP)
        row = block_m * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        weight, first = wq, 0
        if block_n >= blocks_q + blocks_k:
            weight, first = wv, blocks_q + blocks_k
        elif block_n >= blocks_q:
            weight, first = wk, blocks_q
        column = (block_n - first) * BLOCK_N
        accumulator = _add_descriptor_product(
            accumulator, x, weight, row, column, K, False, PRECISION, BLOCK_K
        )  # fmt: skip
        if block_n < blocks_q:
            _store(accumulator, rows, column, M, NQ, q_ptr, bq_ptr, NQ, BLOCK_M, BLOCK_N, PARTS)
        elif block_n < blocks_q + blocks_k:
            _store(accumulator, rows, column, M, NK, k_ptr, bk_ptr, NK, BLOCK_M, BLOCK_N, PARTS)
        else:
            _store(accumulator, rows, column, M, NV, v_ptr, bv_ptr, NV, BLOCK_M, BLOCK_N, PARTS)


@triton.jit
def persistent_sum_kernel(
    dq_ptr, dk_ptr, dv_ptr, wq_ptr, wk_ptr, wv_ptr, dx_ptr,
    M, NQ, NK, NV, K, stride_q, stride_k, stride_v, stride_w,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    dq = tl.make_tensor_descriptor(dq_ptr, [M, NQ], [stride_q.to(tl.int64), 1], [BLOCK_M, BLOCK_K])
    dk = tl.make_tensor_descriptor(dk_ptr, [M, NK], [stride_k.to(tl.int64), 1], [BLOCK_M, BLOCK_K])
    dv = tl.make_tensor_descriptor(dv_ptr, [M, NV], [stride_v.to(tl.int64), 1], [BLOCK_M, BLOCK_K])
    wq = tl.make_tensor_descriptor(wq_ptr, [NQ, K], [stride_w.to(tl.int64), 1], [BLOCK_K, BLOCK_N])
    wk = tl.make_tensor_descriptor(wk_ptr, [NK, K], [stride_w.to(tl.int64), 1], [BLOCK_K, BLOCK_N])
    wv = tl.make_tensor_descriptor(wv_ptr, [NV, K], [stride_w.to(tl.int64), 1], [BLOCK_K, BLOCK_N])
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(K, BLOCK_N)
    for number in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=False):
        block_m, block_n = _place(number, blocks_m, blocks_n, GROUP)
        row, column = block_m * BLOCK_M, block_n * BLOCK_N
        dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        dx = _add_descriptor_product(dx, dq, wq, row, column, NQ, True, PRECISION, BLOCK_K)
        dx = _add_descriptor_product(dx, dk, wk, row, column, NK, True, PRECISION, BLOCK_K)
        dx = _add_descriptor_product(dx, dv, wv, row, column, NV, True, PRECISION, BLOCK_K)
        rows = row + tl.arange(0, BLOCK_M)
        _store(dx, rows, column, M, K, dx_ptr, None, K, BLOCK_M, BLOCK_N, PARTS)
