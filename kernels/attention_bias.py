"""The gradient of a bias that is added to the scores of `attention`: dS, summed over what the bias repeats.

One program owns a tile of the bias and walks, in order, the batch elements, heads, rows and columns that
share it, computing S and P again: two products more, but neither dS in memory nor atomics.
"""

from __future__ import annotations

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.attention_tiles import (
    capped_scores,
    head_offset,
    kept,
    keys_seen,
    load_rows,
    mask_scores,
    probabilities,
    slope_of,
)


@triton.jit
def grad_bias_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, places_ptr, documents_ptr, key_documents_ptr,
    global_queries_ptr, global_keys_ptr, seed_ptr, stats_ptr, delta_ptr, dbias_ptr,
    stride_yb, stride_yh, stride_ym, stride_yd, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_sb, stride_sh, stride_pb, stride_db, stride_eb, stride_gb, stride_hb,
    B, H, GROUP, Tq, Tk, rows_total, scale, scale_log2, cap_log2, low, high, offset, dropout, seed_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, BAND: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr,
    ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, GLOBALS: tl.constexpr, PRECISION: tl.constexpr,
    BATCHES: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # BATCHES, HEADS, ROWS, COLUMNS: the bias has that dimension; where not, it is repeated along it.
    tiles_m = tl.cdiv(Tq, BLOCK_M) if ROWS else 1
    tiles_n = tl.cdiv(Tk, BLOCK_N) if COLUMNS else 1
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    owner = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = tile // tiles_n, tile % tiles_n
    first_batch = owner // (H if HEADS else 1) if BATCHES else 0
    first_head = owner % H if HEADS else 0
    heads = 1 if HEADS else H
    members = heads if BATCHES else heads * B
    first_m = tile_m * BLOCK_M
    last_m = first_m + BLOCK_M if ROWS else Tq
    first_n = tile_n * BLOCK_N
    last_n = first_n + BLOCK_N if COLUMNS else Tk
    if DROPOUT:
        seed = tl.load(seed_ptr) + seed_offset

    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for member in tl.range(0, members, num_stages=1):
        batch = first_batch + member // heads
        head = first_head + member % heads
        head_index = batch * H + head
        q_head = q_ptr + head_offset(stride_qb, stride_qh, batch, head)
        dy_head = dy_ptr + head_offset(stride_yb, stride_yh, batch, head)
        k_head = k_ptr + head_offset(stride_kb, stride_kh, batch, head // GROUP)
        v_head = v_ptr + head_offset(stride_vb, stride_vh, batch, head // GROUP)
        mask_head = mask_ptr + head_offset(stride_mb, stride_mh, batch, head)
        slope = 0.0
        places, documents, key_documents = places_ptr, documents_ptr, key_documents_ptr
        global_queries, global_keys = global_queries_ptr, global_keys_ptr
        if ALIBI != 0:
            slope = slope_of(slopes_ptr, stride_sb, stride_sh, batch, head)
        if ALIBI == 2:
            places += batch.to(tl.int64) * stride_pb
        if DOCUMENTS:
            documents += batch.to(tl.int64) * stride_db
            key_documents += batch.to(tl.int64) * stride_eb
        if GLOBALS != 0:
            global_queries += batch.to(tl.int64) * stride_gb
            global_keys += batch.to(tl.int64) * stride_hb
        for start_m in tl.range(first_m, last_m, BLOCK_M, num_stages=1):
            m = start_m + tl.arange(0, BLOCK_M)
            rows = head_index.to(tl.int64) * Tq + m
            q = load_rows(q_head, m, stride_qm, stride_qd, Tq, D, BLOCK_D)
            dy = load_rows(dy_head, m, stride_ym, stride_yd, Tq, DV, BLOCK_DV)
            delta = tl.load(delta_ptr + rows, mask=m < Tq, other=0.0)
            first, last = keys_seen(start_m // BLOCK_M, Tk, low, high, BLOCK_M, BLOCK_N, BAND)
            if GLOBALS != 0:  # nothing is skipped: a bias of every score is in memory anyway
                first, last = 0, Tk
            for start in tl.range(tl.maximum(first, first_n), tl.minimum(last, last_n), BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                k = load_rows(k_head, n, stride_kn, stride_kd, Tk, D, BLOCK_D)
                v = load_rows(v_head, n, stride_vn, stride_vd, Tk, DV, BLOCK_DV)
                products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                scores = capped_scores(products, scale_log2, cap_log2, CAP)
                scores = mask_scores(
                    scores, m[:, None], n[None, :], mask_head, stride_mm, stride_mn, slope, places,
                    documents, key_documents, global_queries, global_keys,
                    Tq, Tk, low, high, offset, MASK, BAND, True, ALIBI, DOCUMENTS, GLOBALS,
                )  # fmt: skip
                p = probabilities(scores, stats_ptr, rows[:, None], (m < Tq)[:, None], rows_total, MASK)
                dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
                if DROPOUT:
                    keeps = kept(seed, head_index, m[:, None], n[None, :], Tq, Tk, dropout)
                    dp = tl.where(keeps, dp * (1.0 / (1.0 - dropout)), 0.0)
                dbias += p * (dp - delta[:, None])

    count_m = Tq if ROWS else 1
    count_n = Tk if COLUMNS else 1
    dbias_ptr += owner.to(tl.int64) * count_m * count_n
    dtype = dbias_ptr.dtype.element_ty
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    if ROWS and COLUMNS:
        ptrs = dbias_ptr + m.to(tl.int64)[:, None] * Tk + n[None, :]
        tl.store(ptrs, dbias.to(dtype), mask=(m < Tq)[:, None] & (n < Tk)[None, :])
    elif ROWS:
        tl.store(dbias_ptr + m, tl.sum(dbias, 1).to(dtype), mask=m < Tq)
    elif COLUMNS:
        tl.store(dbias_ptr + n, tl.sum(dbias, 0).to(dtype), mask=n < Tk)
    else:
        tl.store(dbias_ptr, tl.sum(tl.sum(dbias, 1), 0).to(dtype))
