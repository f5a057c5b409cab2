r"""Triton kernels of `attention`, and their launchers: one forward, two backward, no atomics.

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

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.launch import launch

LOG2E = 1.4426950408889634
NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2


@triton.jit
def _head_offset(stride_b, stride_h, batch, head):
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def _load_rows(base_ptr, rows, stride_row, stride_d, ROWS, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of one head; zero past the last row and past the last feature."""
    features = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride_row + features[None, :] * stride_d
    if D == BLOCK_D:
        return tl.load(ptrs, mask=rows[:, None] < ROWS, other=0.0)
    return tl.load(ptrs, mask=(rows[:, None] < ROWS) & (features[None, :] < D), other=0.0)


@triton.jit
def _store_rows(base_ptr, rows, stride_row, block, ROWS, D: tl.constexpr, BLOCK_D: tl.constexpr):
    features = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride_row + features[None, :]
    inside = (rows[:, None] < ROWS) & (features[None, :] < D)
    tl.store(ptrs, block.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mask_scores(
    scores, m, n, mask_ptr, stride_mm, stride_mn, Tq, Tk,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Scores with what may not be attended at -inf. m and n broadcast to the tile, in either orientation."""
    if MASK != 0:
        ptrs = mask_ptr + m.to(tl.int64) * stride_mm + n.to(tl.int64) * stride_mn
        inside = (m < Tq) & (n < Tk)
        if MASK == 1:
            scores = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, scores, float("-inf"))
        else:
            added = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
            in_log2 = added * 1.4426950408889634
            # finfo.min leaves the range when scaled; as -inf it would no longer share a row out evenly.
            overflown = (in_log2 == float("-inf")) & (added != float("-inf"))
            scores += tl.where(overflown, -3.4028234663852886e38, in_log2)
    if BOUNDED:
        scores = tl.where(n < Tk, scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(n <= m, scores, float("-inf"))
    return scores


@triton.jit
def _kept(seed, head_index, m, n, Tq, Tk, dropout):
    """Which elements dropout keeps: element (b, h, m, n) draws number ((b H + h) Tq + m) Tk + n."""
    return tl.rand(seed, (head_index.to(tl.int64) * Tq + m) * Tk + n) >= dropout


@triton.jit
def _forward_blocks(
    acc, total, largest, q, k_ptr, v_ptr, mask_ptr, m, first, last,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
    Tq, Tk, scale_log2, seed, head_index, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, n, stride_kn, stride_kd, Tk, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if MASK != 0 or BOUNDED:
            scores = _mask_scores(
                scores, m[:, None], n[None, :], mask_ptr, stride_mm, stride_mn, Tq, Tk, MASK, CAUSAL, BOUNDED
            )
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A masked row may have met no key yet, and -inf - -inf is NaN. Without a mask every row meets key 0.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASK != 0 else new_largest
        p = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(largest - base)
        total = total * rescale + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(_kept(seed, head_index, m[:, None], n[None, :], Tq, Tk, dropout), p, 0.0)
        v = _load_rows(v_ptr, n, stride_vn, stride_vd, Tk, DV, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        largest = new_largest
    return acc, total, largest


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, out_ptr, stats_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_mb, stride_mh, stride_mm, stride_mn,
    H, GROUP, Tq, Tk, rows_total, scale_log2, dropout, seed_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    head_index = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first
    batch, head = head_index // H, head_index % H
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += _head_offset(stride_qb, stride_qh, batch, head)
    q = _load_rows(q_ptr, m, stride_qm, stride_qd, Tq, D, BLOCK_D)
    k_ptr += _head_offset(stride_kb, stride_kh, batch, head // GROUP)
    v_ptr += _head_offset(stride_vb, stride_vh, batch, head // GROUP)
    if MASK != 0:
        mask_ptr += _head_offset(stride_mb, stride_mh, batch, head)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr) + seed_offset

    last = tl.minimum(Tk, (block + 1) * BLOCK_M) if CAUSAL else Tk
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = 0
    if MASK == 0:  # a mask is read everywhere: one loop does
        whole = tl.minimum(Tk, block * BLOCK_M + 1) if CAUSAL else Tk
        whole = whole // BLOCK_N * BLOCK_N  # blocks before this need neither causal nor end-of-keys test
        acc, total, largest = _forward_blocks(
            acc, total, largest, q, k_ptr, v_ptr, mask_ptr, m, 0, whole,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
            Tq, Tk, scale_log2, seed, head_index, dropout,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, MASK, False, DROPOUT, False, PRECISION,
        )  # fmt: skip
    acc, total, largest = _forward_blocks(
        acc, total, largest, q, k_ptr, v_ptr, mask_ptr, m, whole, last,
        stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
        Tq, Tk, scale_log2, seed, head_index, dropout,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, MASK, CAUSAL, DROPOUT, True, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    if DROPOUT:
        out *= 1.0 / (1.0 - dropout)
    out_ptr += (batch.to(tl.int64) * Tq * H + head) * DV
    _store_rows(out_ptr, m, H * DV, out, Tq, DV, BLOCK_DV)
    rows = head_index.to(tl.int64) * Tq + m
    if MASK == 2:
        tl.store(stats_ptr + rows, tl.where(empty, float("inf"), largest), mask=m < Tq)
        tl.store(stats_ptr + rows_total + rows, tl.log2(tl.where(empty, 1.0, total)), mask=m < Tq)
    else:
        tl.store(stats_ptr + rows, tl.where(empty, float("inf"), largest + tl.log2(total)), mask=m < Tq)


@triton.jit
def _probabilities(scores, stats_ptr, rows, inside, rows_total, MASK: tl.constexpr):
    """P of the forward pass again. rows broadcasts to the tile; outside, +inf makes it zero."""
    p = scores - tl.load(stats_ptr + rows, mask=inside, other=float("inf"))
    if MASK == 2:
        p -= tl.load(stats_ptr + rows_total + rows, mask=inside, other=0.0)
    return tl.exp2(p)


@triton.jit
def _grad_query_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, out_ptr, mask_ptr, seed_ptr, stats_ptr, delta_ptr, dq_ptr,
    stride_yb, stride_yh, stride_ym, stride_yd, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mh, stride_mm, stride_mn,
    H, GROUP, Tq, Tk, rows_total, scale, scale_log2, dropout, seed_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # With dP = dy v^T and delta = rowsum(dy * out):  dS = P (dP - delta),  dq = scale dS k
    # delta is stored here for the other kernel, since this one reads dy and out rows anyway.
    blocks = tl.cdiv(Tq, BLOCK_M)
    head_index = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    batch, head = head_index // H, head_index % H
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = head_index.to(tl.int64) * Tq + m
    dy_ptr += _head_offset(stride_yb, stride_yh, batch, head)
    dy = _load_rows(dy_ptr, m, stride_ym, stride_yd, Tq, DV, BLOCK_DV)
    out_ptr += (batch.to(tl.int64) * Tq * H + head) * DV
    out = _load_rows(out_ptr, m, H * DV, 1, Tq, DV, BLOCK_DV)
    delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=m < Tq)
    q_ptr += _head_offset(stride_qb, stride_qh, batch, head)
    q = _load_rows(q_ptr, m, stride_qm, stride_qd, Tq, D, BLOCK_D)
    k_ptr += _head_offset(stride_kb, stride_kh, batch, head // GROUP)
    v_ptr += _head_offset(stride_vb, stride_vh, batch, head // GROUP)
    if MASK != 0:
        mask_ptr += _head_offset(stride_mb, stride_mh, batch, head)
    if DROPOUT:
        seed = tl.load(seed_ptr) + seed_offset

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.minimum(Tk, (block + 1) * BLOCK_M) if CAUSAL else Tk
    for start in tl.range(0, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, n, stride_kn, stride_kd, Tk, D, BLOCK_D)
        v = _load_rows(v_ptr, n, stride_vn, stride_vd, Tk, DV, BLOCK_DV)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = _mask_scores(
            scores, m[:, None], n[None, :], mask_ptr, stride_mm, stride_mn, Tq, Tk, MASK, CAUSAL, True
        )
        p = _probabilities(scores, stats_ptr, rows[:, None], (m < Tq)[:, None], rows_total, MASK)
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            kept = _kept(seed, head_index, m[:, None], n[None, :], Tq, Tk, dropout)
            dp = tl.where(kept, dp * (1.0 / (1.0 - dropout)), 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_ptr += (batch.to(tl.int64) * Tq * H + head) * D
    _store_rows(dq_ptr, m, H * D, dq * scale, Tq, D, BLOCK_D)


@triton.jit
def _grad_key_value_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_yb, stride_yh, stride_ym, stride_yd, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mh, stride_mm, stride_mn,
    H, GROUP, Tq, Tk, rows_total, scale, scale_log2, dropout, seed_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
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
    k_ptr += _head_offset(stride_kb, stride_kh, batch, kv_head)
    v_ptr += _head_offset(stride_vb, stride_vh, batch, kv_head)
    k = _load_rows(k_ptr, n, stride_kn, stride_kd, Tk, D, BLOCK_D)
    v = _load_rows(v_ptr, n, stride_vn, stride_vd, Tk, DV, BLOCK_DV)
    if DROPOUT:
        seed = tl.load(seed_ptr) + seed_offset

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    first = block * BLOCK_N // BLOCK_M * BLOCK_M if CAUSAL else 0
    for member in tl.range(0, GROUP, num_stages=1):
        head = kv_head * GROUP + member
        head_index = batch * H + head
        dy_head = dy_ptr + _head_offset(stride_yb, stride_yh, batch, head)
        q_head = q_ptr + _head_offset(stride_qb, stride_qh, batch, head)
        mask_head = mask_ptr
        if MASK != 0:
            mask_head += _head_offset(stride_mb, stride_mh, batch, head)
        for start in tl.range(first, Tq, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            rows = head_index.to(tl.int64) * Tq + m
            q = _load_rows(q_head, m, stride_qm, stride_qd, Tq, D, BLOCK_D)
            dy = _load_rows(dy_head, m, stride_ym, stride_yd, Tq, DV, BLOCK_DV)
            delta = tl.load(delta_ptr + rows, mask=m < Tq, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
            scores = _mask_scores(
                scores, m[None, :], n[:, None], mask_head, stride_mm, stride_mn, Tq, Tk, MASK, CAUSAL, True
            )
            p = _probabilities(scores, stats_ptr, rows[None, :], (m < Tq)[None, :], rows_total, MASK)
            dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
            if DROPOUT:
                kept = _kept(seed, head_index, m[None, :], n[:, None], Tq, Tk, dropout)
                dp = tl.where(kept, dp * (1.0 / (1.0 - dropout)), 0.0)
                dropped = tl.where(kept, p * (1.0 / (1.0 - dropout)), 0.0)
                dv = tl.dot(dropped.to(dy.dtype), dy, dv, input_precision=PRECISION)
            else:
                dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_ptr += (batch.to(tl.int64) * Tk * KV_HEADS + kv_head) * D
    dv_ptr += (batch.to(tl.int64) * Tk * KV_HEADS + kv_head) * DV
    _store_rows(dk_ptr, n, KV_HEADS * D, dk * scale, Tk, D, BLOCK_D)
    _store_rows(dv_ptr, n, KV_HEADS * DV, dv, Tk, DV, BLOCK_DV)


# (block of queries, block of keys, warps, stages) by kernel and padded head dimension: plain or causal; with
# a mask; with dropout. Large tiles that triton 3.6 compiles for sm_90 without spills or serialised wgmma.
# Mask tiles are small and not pipelined: a thread reads its elements one by one, an address of 64 bits each.
# Philox takes registers too.
CONFIGS = {
    "forward": {
        64: ((128, 64, 8, 3), (128, 32, 8, 1), (128, 32, 8, 2)),
        128: ((128, 64, 8, 3), (64, 16, 8, 1), (128, 32, 8, 2)),
    },
    "grad_query": {
        64: ((128, 64, 8, 3), (64, 32, 4, 1), (64, 32, 4, 2)),
        128: ((128, 32, 8, 2), (32, 32, 4, 1), (128, 32, 8, 2)),
    },
    "grad_key_value": {
        64: ((64, 128, 8, 2), (32, 64, 8, 1), (32, 128, 8, 2)),
        128: ((64, 128, 8, 2), (32, 64, 8, 1), (16, 128, 8, 2)),
    },
}
SHARED_HEADS = {64: (64, 128, 8, 2), 128: (32, 64, 8, 2)}  # grad_key_value, no mask
# float32 products run on the FMA units, whose operands sit in registers: small tiles, many warps.
CONFIGS_FLOAT32 = {
    "forward": {32: (16, 16, 4, 1), 64: (32, 16, 8, 1), 128: (32, 16, 8, 1)},
    "grad_query": {32: (32, 32, 8, 2), 64: (32, 32, 8, 2), 128: (16, 16, 8, 2)},
    "grad_key_value": {32: (16, 16, 4, 1), 64: (16, 32, 8, 1), 128: (16, 16, 8, 1)},
}


def _padded(features: int) -> int:
    return max(16, 1 << (features - 1).bit_length())


def _blocks(
    kernel: str, q: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[int, int, int, int]:
    widest = _padded(max(q.shape[-1], v.shape[-1]))
    if q.dtype == torch.float32:
        return CONFIGS_FLOAT32[kernel][max(32, widest)]
    widest = max(64, widest)
    plain, masked, dropping = CONFIGS[kernel][widest]
    if dropout > 0.0:
        return dropping
    if mask is not None:
        return masked
    shared = kernel == "grad_key_value" and q.shape[1] != v.shape[1]
    return SHARED_HEADS[widest] if shared else plain


def _constants(
    q: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, tf32: bool,
    block_m: int, block_n: int,
) -> dict[str, object]:  # fmt: skip
    D, DV = q.shape[-1], v.shape[-1]
    given = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.uint8 else ADDITIVE_MASK
    return {
        "D": D, "DV": DV, "BLOCK_D": _padded(D), "BLOCK_DV": _padded(DV),
        "BLOCK_M": block_m, "BLOCK_N": block_n, "MASK": given, "CAUSAL": causal,
        "DROPOUT": dropout > 0.0, "PRECISION": "tf32" if tf32 else "ieee",
    }  # fmt: skip


def _broadcast(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """The mask as (B, H, Tq, Tk), broadcast dimensions at stride 0, booleans as bytes; and its strides."""
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask.expand(*q.shape[:-1], k.shape[-2])
    return mask, mask.stride()


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dropout: float, seed: Tensor | None, seed_offset: int, tf32: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Tq, DV) in (B, Tq, H, DV) memory, and stats."""
    (B, H, Tq, _), Tk = q.shape, k.shape[-2]
    mask, mask_strides = _broadcast(mask, q, k)
    block_m, block_n, warps, stages = _blocks("forward", q, v, mask, dropout)
    constants = _constants(q, v, mask, causal, dropout, tf32, block_m, block_n)
    out = q.new_empty((B, Tq, H, v.shape[-1]))
    stats = q.new_empty((1 + (constants["MASK"] == ADDITIVE_MASK), B, H, Tq), dtype=torch.float32)
    launch(
        _forward_kernel, (B * H * triton.cdiv(Tq, block_m),),
        q, k, v, mask, seed, out, stats, *q.stride(), *k.stride(), *v.stride(), *mask_strides,
        H, H // k.shape[1], Tq, Tk, B * H * Tq, scale * LOG2E, dropout, seed_offset,
        **constants, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out.transpose(1, 2), stats


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, mask: Tensor | None,
    causal: bool, scale: float, dropout: float, seed: Tensor | None, seed_offset: int, tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, each laid out as (B, T, H, D)."""
    (B, H, Tq, D), (_, kv_heads, Tk, DV) = q.shape, v.shape
    mask, mask_strides = _broadcast(mask, q, k)
    delta = stats.new_empty((B, H, Tq))
    dq = q.new_empty((B, Tq, H, D))
    dk, dv = k.new_empty((B, Tk, kv_heads, D)), v.new_empty((B, Tk, kv_heads, DV))
    strides = (*dy.stride(), *q.stride(), *k.stride(), *v.stride(), *mask_strides)
    numbers = (H, H // kv_heads, Tq, Tk, B * H * Tq, scale, scale * LOG2E, dropout, seed_offset)

    block_m, block_n, warps, stages = _blocks("grad_query", q, v, mask, dropout)
    launch(
        _grad_query_kernel, (B * H * triton.cdiv(Tq, block_m),),
        dy, q, k, v, out, mask, seed, stats, delta, dq, *strides, *numbers,
        **_constants(q, v, mask, causal, dropout, tf32, block_m, block_n), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_m, block_n, warps, stages = _blocks("grad_key_value", q, v, mask, dropout)
    launch(
        _grad_key_value_kernel, (B * kv_heads * triton.cdiv(Tk, block_n),),
        dy, q, k, v, mask, seed, stats, delta, dk, dv, *strides, *numbers,
        **_constants(q, v, mask, causal, dropout, tf32, block_m, block_n), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
