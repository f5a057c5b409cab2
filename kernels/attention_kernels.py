r"""Triton kernels of `attention`: one forward, two backward, no atomics.

Each program owns the rows it writes: a block of queries in `_forward_kernel` and `_grad_query_kernel`, a
block of keys in `_grad_key_value_kernel`, which walks all query heads that share those keys. Scores live in
registers only, in units of log2, so that the softmax is one exp2 an element.

What the forward pass leaves for the backward pass is `stats`, (1 or 2, B, H, Tq) in float32:
    no mask or a boolean one   [log2 sum exp2(scores)], +inf for a row without keys: its P comes out as zero;
    an additive mask           [the largest score, log2 sum exp2(scores - largest)], apart, because next to a
                               score of -3e38 (a row masked with finfo.min) the sum would be rounded away.
Shape suffixes: M queries, N keys, D and DV features.
"""

from __future__ import annotations

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.attention_globals import keys_visited, queries_visited, visited
from fusekit.kernels.attention_tail import cut_off, rejoined
from fusekit.kernels.attention_tiles import (
    capped_scores,
    head_offset,
    kept,
    keys_seen,
    load_rows,
    mask_scores,
    probabilities,
    queries_seeing,
    slope_of,
    store_rows,
    uncap,
    within,
)


@triton.jit
def _forward_blocks(
    acc, total, largest, q, k_ptr, v_ptr, mask_ptr, slope, places_ptr, documents_ptr, key_documents_ptr,
    global_queries_ptr, global_keys_ptr, blocks_ptr, left, jump, m, first, last, end,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
    Tq, Tk, scale_log2, cap_log2, low, high, offset, seed, head_index, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, BAND: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, BOUNDED: tl.constexpr,
    ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, GLOBALS: tl.constexpr, PRECISION: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    # FOLDED: scores are bare products here, and the scale, which is positive, rides on the exponent's
    # subtraction as one multiply-add an element.
    factor = scale_log2 if FOLDED else 1.0
    for step in tl.range(first, end, BLOCK_N):
        start = visited(step, last, blocks_ptr, left, jump, BLOCK_N) if GLOBALS != 0 else step
        n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, stride_kn, stride_kd, Tk, D, BLOCK_D)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = products if FOLDED else capped_scores(products, scale_log2, cap_log2, CAP)
        if MASK != 0 or BOUNDED or ALIBI != 0:
            scores = mask_scores(
                scores, m[:, None], n[None, :], mask_ptr, stride_mm, stride_mn, slope, places_ptr,
                documents_ptr, key_documents_ptr, global_queries_ptr, global_keys_ptr,
                Tq, Tk, low, high, offset, MASK, BAND, BOUNDED, ALIBI, DOCUMENTS, GLOBALS,
            )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, 1) * factor)
        # A masked row may have met no key yet, and -inf - -inf is NaN. Else every row meets key 0 at once.
        base = new_largest
        if MASK != 0 or BAND == 2 or DOCUMENTS:
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(scores * factor - base[:, None]).to(v_ptr.dtype.element_ty)
        rescale = tl.exp2(largest - base)
        if p.dtype == tl.float32 or acc.shape[0] < 64:  # too few rows for four warps, Triton 3.8 finds
            total = total * rescale + tl.sum(p.to(tl.float32), 1)
        else:  # added up as they meet v, rounded, and by the same units: weights that add up to one
            total = tl.dot(p, tl.full((BLOCK_N, total.shape[1]), 1.0, p.dtype), total * rescale[:, None])
        if DROPOUT:
            p = tl.where(kept(seed, head_index, m[:, None], n[None, :], Tq, Tk, dropout), p, 0.0)
        v = load_rows(v_ptr, n, stride_vn, stride_vd, Tk, DV, BLOCK_DV)
        acc = tl.dot(p, v, acc * rescale[:, None], input_precision=PRECISION)
        largest = new_largest
    return acc, total, largest


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, sinks_ptr, slopes_ptr, places_ptr, documents_ptr, key_documents_ptr,
    global_queries_ptr, global_keys_ptr, ranges_ptr, blocks_ptr, seed_ptr, out_ptr, tail_ptr,
    stats_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_sb, stride_sh, stride_pb, stride_db, stride_eb, stride_gb, stride_hb,
    H, GROUP, Tq, Tk, rows_total, scale_log2, cap_log2, low, high, offset, dropout, seed_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, BAND: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr,
    ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, GLOBALS: tl.constexpr, PRECISION: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    head_index = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first
    batch, head = head_index // H, head_index % H
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += head_offset(stride_qb, stride_qh, batch, head)
    q = load_rows(q_ptr, m, stride_qm, stride_qd, Tq, D, BLOCK_D)
    k_ptr += head_offset(stride_kb, stride_kh, batch, head // GROUP)
    v_ptr += head_offset(stride_vb, stride_vh, batch, head // GROUP)
    if MASK != 0:
        mask_ptr += head_offset(stride_mb, stride_mh, batch, head)
    slope = 0.0
    if ALIBI != 0:
        slope = slope_of(slopes_ptr, stride_sb, stride_sh, batch, head)
    if ALIBI == 2:
        places_ptr += batch.to(tl.int64) * stride_pb
    if DOCUMENTS:
        documents_ptr += batch.to(tl.int64) * stride_db
        key_documents_ptr += batch.to(tl.int64) * stride_eb
    if GLOBALS != 0:
        global_queries_ptr += batch.to(tl.int64) * stride_gb
        global_keys_ptr += batch.to(tl.int64) * stride_hb
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr) + seed_offset

    first, last = keys_seen(block, Tk, low, high, BLOCK_M, BLOCK_N, BAND)
    if DOCUMENTS:
        first, last = within(first, last, ranges_ptr, batch, block, blocks, BLOCK_N)
    end, left, jump = last, 0, 0
    if GLOBALS != 0:
        first, last, end, blocks_ptr, left, jump = keys_visited(
            first, last, block, batch, m, Tq, Tk, high, global_queries_ptr, blocks_ptr, ranges_ptr,
            BLOCK_M, BLOCK_N, DOCUMENTS, GLOBALS,
        )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    if v_ptr.dtype.element_ty == tl.float32 or BLOCK_M < 64:
        total = tl.zeros((BLOCK_M,), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, 16 if BLOCK_N < 128 else 8), tl.float32)  # 8: for its shared memory
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # A mask and documents are read everywhere, a window has two edges: one loop does.
    if MASK == 0 and BAND != 2 and not DOCUMENTS:
        whole = tl.minimum(Tk, block * BLOCK_M + 1) if BAND == 1 else Tk
        whole = whole // BLOCK_N * BLOCK_N  # blocks before this need neither causal nor end-of-keys test
        acc, total, largest = _forward_blocks(
            acc, total, largest, q, k_ptr, v_ptr, mask_ptr, slope, places_ptr, documents_ptr,
            key_documents_ptr, global_queries_ptr, global_keys_ptr, blocks_ptr, 0, 0, m, 0, whole, whole,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
            Tq, Tk, scale_log2, cap_log2, low, high, offset, seed, head_index, dropout,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            MASK, 0, CAP, DROPOUT, False, ALIBI, DOCUMENTS, GLOBALS, PRECISION, FOLDED,
        )  # fmt: skip
        first = whole
    acc, total, largest = _forward_blocks(
        acc, total, largest, q, k_ptr, v_ptr, mask_ptr, slope, places_ptr, documents_ptr,
        key_documents_ptr, global_queries_ptr, global_keys_ptr, blocks_ptr, left, jump, m, first, last, end,
        stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
        Tq, Tk, scale_log2, cap_log2, low, high, offset, seed, head_index, dropout,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
        MASK, BAND, CAP, DROPOUT, True, ALIBI, DOCUMENTS, GLOBALS, PRECISION, FOLDED,
    )  # fmt: skip

    if v_ptr.dtype.element_ty != tl.float32 and BLOCK_M >= 64:
        total = tl.max(total, 1)  # columns are alike
    if sinks_ptr is not None:  # one logit more in the sum, which brings no value
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        base = tl.maximum(largest, sink)
        base = tl.where(base == float("-inf"), 0.0, base)
        rescale = tl.exp2(largest - base)
        total = total * rescale + tl.exp2(sink - base)
        acc *= rescale[:, None]
        largest = base
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    if DROPOUT:
        out *= 1.0 / (1.0 - dropout)
    first_row = (batch.to(tl.int64) * Tq * H + head) * DV
    rounded = out.to(out_ptr.dtype.element_ty)
    store_rows(out_ptr + first_row, m, H * DV, rounded, Tq, DV, BLOCK_DV)
    if tail_ptr is not None:
        store_rows(tail_ptr + first_row, m, H * DV, cut_off(out, rounded), Tq, DV, BLOCK_DV)
    rows = head_index.to(tl.int64) * Tq + m
    if MASK == 2:
        tl.store(stats_ptr + rows, tl.where(empty, float("inf"), largest), mask=m < Tq)
        tl.store(stats_ptr + rows_total + rows, tl.log2(tl.where(empty, 1.0, total)), mask=m < Tq)
    else:
        tl.store(stats_ptr + rows, tl.where(empty, float("inf"), largest + tl.log2(total)), mask=m < Tq)


@triton.jit
def _grad_query_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, out_ptr, tail_ptr, mask_ptr, slopes_ptr, places_ptr,
    documents_ptr, key_documents_ptr, global_queries_ptr, global_keys_ptr, ranges_ptr, blocks_ptr,
    seed_ptr, stats_ptr, delta_ptr, given_ptr, dq_ptr,
    stride_yb, stride_yh, stride_ym, stride_yd, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_sb, stride_sh, stride_pb, stride_db, stride_eb, stride_gb, stride_hb,
    H, GROUP, Tq, Tk, rows_total, scale, scale_log2, cap_log2, low, high, offset, dropout, seed_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, BAND: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr,
    ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, GLOBALS: tl.constexpr, PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr = False,
):  # fmt: skip
    # With dP = dy v^T and delta = rowsum(dy * out):  dS = P (dP - delta),  dq = scale dS k
    # delta is stored here for the other kernel, since this one reads dy and out rows anyway. The gradient of
    # sinks, a sum over rows that cancels in part, would show that out was rounded: it takes rowsum(P dP).
    blocks = tl.cdiv(Tq, BLOCK_M)
    head_index = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    batch, head = head_index // H, head_index % H
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = head_index.to(tl.int64) * Tq + m
    dy_ptr += head_offset(stride_yb, stride_yh, batch, head)
    dy = load_rows(dy_ptr, m, stride_ym, stride_yd, Tq, DV, BLOCK_DV)
    first_row = (batch.to(tl.int64) * Tq * H + head) * DV
    out = load_rows(out_ptr + first_row, m, H * DV, 1, Tq, DV, BLOCK_DV)
    if tail_ptr is not None:
        out = rejoined(out, load_rows(tail_ptr + first_row, m, H * DV, 1, Tq, DV, BLOCK_DV))
    delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=m < Tq)
    q_ptr += head_offset(stride_qb, stride_qh, batch, head)
    q = load_rows(q_ptr, m, stride_qm, stride_qd, Tq, D, BLOCK_D)
    k_ptr += head_offset(stride_kb, stride_kh, batch, head // GROUP)
    v_ptr += head_offset(stride_vb, stride_vh, batch, head // GROUP)
    if MASK != 0:
        mask_ptr += head_offset(stride_mb, stride_mh, batch, head)
    slope = 0.0
    if ALIBI != 0:
        slope = slope_of(slopes_ptr, stride_sb, stride_sh, batch, head)
    if ALIBI == 2:
        places_ptr += batch.to(tl.int64) * stride_pb
    if DOCUMENTS:
        documents_ptr += batch.to(tl.int64) * stride_db
        key_documents_ptr += batch.to(tl.int64) * stride_eb
    if GLOBALS != 0:
        global_queries_ptr += batch.to(tl.int64) * stride_gb
        global_keys_ptr += batch.to(tl.int64) * stride_hb
    if DROPOUT:
        seed = tl.load(seed_ptr) + seed_offset

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if given_ptr is not None:
        given = tl.zeros((BLOCK_M,), tl.float32)
    first, last = keys_seen(block, Tk, low, high, BLOCK_M, BLOCK_N, BAND)
    if DOCUMENTS:
        first, last = within(first, last, ranges_ptr, batch, block, blocks, BLOCK_N)
    end, left, jump = last, 0, 0
    if GLOBALS != 0:
        first, last, end, blocks_ptr, left, jump = keys_visited(
            first, last, block, batch, m, Tq, Tk, high, global_queries_ptr, blocks_ptr, ranges_ptr,
            BLOCK_M, BLOCK_N, DOCUMENTS, GLOBALS,
        )  # fmt: skip
    for step in tl.range(first, end, BLOCK_N):
        start = visited(step, last, blocks_ptr, left, jump, BLOCK_N) if GLOBALS != 0 else step
        n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, stride_kn, stride_kd, Tk, D, BLOCK_D)
        v = load_rows(v_ptr, n, stride_vn, stride_vd, Tk, DV, BLOCK_DV)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = capped_scores(products, scale_log2, cap_log2, CAP)
        masked = mask_scores(
            scores, m[:, None], n[None, :], mask_ptr, stride_mm, stride_mn, slope, places_ptr,
            documents_ptr, key_documents_ptr, global_queries_ptr, global_keys_ptr,
            Tq, Tk, low, high, offset, MASK, BAND, True, ALIBI, DOCUMENTS, GLOBALS,
        )  # fmt: skip
        p = probabilities(masked, stats_ptr, rows[:, None], (m < Tq)[:, None], rows_total, MASK, ROUNDED)
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keeps = kept(seed, head_index, m[:, None], n[None, :], Tq, Tk, dropout)
            dp = tl.where(keeps, dp * (1.0 / (1.0 - dropout)), 0.0)
        if given_ptr is not None:
            given += tl.sum(p * dp, 1)
        ds = uncap(p * (dp - delta[:, None]), scores, cap_log2, CAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if given_ptr is not None:
        tl.store(given_ptr + rows, given, mask=m < Tq)
    dq_ptr += (batch.to(tl.int64) * Tq * H + head) * D
    store_rows(dq_ptr, m, H * D, dq * scale, Tq, D, BLOCK_D)


@triton.jit
def _grad_key_value_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, places_ptr, documents_ptr, key_documents_ptr,
    global_queries_ptr, global_keys_ptr, ranges_ptr, blocks_ptr,
    seed_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_yb, stride_yh, stride_ym, stride_yd, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_sb, stride_sh, stride_pb, stride_db, stride_eb, stride_gb, stride_hb,
    H, GROUP, Tq, Tk, rows_total, scale, scale_log2, cap_log2, low, high, offset, dropout, seed_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, BAND: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr,
    ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, GLOBALS: tl.constexpr, PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr = False,
):  # fmt: skip
    # dv = P^T dy,  dk = scale dS^T q, summed over the query heads of the group. Tiles are held transposed,
    # (N, M), so that both products take them as the left operand. One masked loop: split in two, triton 3.6
    # serialises wgmma.
    blocks = tl.cdiv(Tk, BLOCK_N)
    kv_index = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks  # causal: the first keys are seen by the most queries, and start first
    KV_HEADS = H // GROUP
    batch, kv_head = kv_index // KV_HEADS, kv_index % KV_HEADS
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += head_offset(stride_kb, stride_kh, batch, kv_head)
    v_ptr += head_offset(stride_vb, stride_vh, batch, kv_head)
    k = load_rows(k_ptr, n, stride_kn, stride_kd, Tk, D, BLOCK_D)
    v = load_rows(v_ptr, n, stride_vn, stride_vd, Tk, DV, BLOCK_DV)
    if DROPOUT:
        seed = tl.load(seed_ptr) + seed_offset

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    if ALIBI == 2:
        places_ptr += batch.to(tl.int64) * stride_pb
    if DOCUMENTS:
        documents_ptr += batch.to(tl.int64) * stride_db
        key_documents_ptr += batch.to(tl.int64) * stride_eb
    if GLOBALS != 0:
        global_queries_ptr += batch.to(tl.int64) * stride_gb
        global_keys_ptr += batch.to(tl.int64) * stride_hb
    first, last = queries_seeing(block, Tq, low, high, BLOCK_M, BLOCK_N, BAND)
    if DOCUMENTS:
        first, last = within(first, last, ranges_ptr, batch, block, blocks, BLOCK_M)
    end, left, jump = last, 0, 0
    if GLOBALS != 0:
        first, last, end, blocks_ptr, left, jump = queries_visited(
            first, last, block, batch, n, Tq, Tk, high, global_keys_ptr, blocks_ptr, ranges_ptr,
            BLOCK_M, BLOCK_N, DOCUMENTS, GLOBALS,
        )  # fmt: skip
    for member in tl.range(0, GROUP, num_stages=1):
        head = kv_head * GROUP + member
        head_index = batch * H + head
        dy_head = dy_ptr + head_offset(stride_yb, stride_yh, batch, head)
        q_head = q_ptr + head_offset(stride_qb, stride_qh, batch, head)
        mask_head = mask_ptr
        if MASK != 0:
            mask_head += head_offset(stride_mb, stride_mh, batch, head)
        slope = 0.0
        if ALIBI != 0:
            slope = slope_of(slopes_ptr, stride_sb, stride_sh, batch, head)
        for step in tl.range(first, end, BLOCK_M):
            start = visited(step, last, blocks_ptr, left, jump, BLOCK_M) if GLOBALS != 0 else step
            m = start + tl.arange(0, BLOCK_M)
            rows = head_index.to(tl.int64) * Tq + m
            q = load_rows(q_head, m, stride_qm, stride_qd, Tq, D, BLOCK_D)
            dy = load_rows(dy_head, m, stride_ym, stride_yd, Tq, DV, BLOCK_DV)
            delta = tl.load(delta_ptr + rows, mask=m < Tq, other=0.0)
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            scores = capped_scores(products, scale_log2, cap_log2, CAP)
            masked = mask_scores(
                scores, m[None, :], n[:, None], mask_head, stride_mm, stride_mn, slope, places_ptr,
                documents_ptr, key_documents_ptr, global_queries_ptr, global_keys_ptr,
                Tq, Tk, low, high, offset, MASK, BAND, True, ALIBI, DOCUMENTS, GLOBALS,
            )  # fmt: skip
            p = probabilities(masked, stats_ptr, rows[None, :], (m < Tq)[None, :], rows_total, MASK, ROUNDED)
            dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
            if DROPOUT:
                keeps = kept(seed, head_index, m[None, :], n[:, None], Tq, Tk, dropout)
                dp = tl.where(keeps, dp * (1.0 / (1.0 - dropout)), 0.0)
                dropped = tl.where(keeps, p * (1.0 / (1.0 - dropout)), 0.0)
                dv = tl.dot(dropped.to(dy.dtype), dy, dv, input_precision=PRECISION)
            else:
                dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PRECISION)
            ds = uncap(p * (dp - delta[None, :]), scores, cap_log2, CAP)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_ptr += (batch.to(tl.int64) * Tk * KV_HEADS + kv_head) * D
    dv_ptr += (batch.to(tl.int64) * Tk * KV_HEADS + kv_head) * DV
    store_rows(dk_ptr, n, KV_HEADS * D, dk * scale, Tk, D, BLOCK_D)
    store_rows(dv_ptr, n, KV_HEADS * DV, dv, Tk, DV, BLOCK_DV)
