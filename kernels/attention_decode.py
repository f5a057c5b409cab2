r"""Attention of a few queries to many keys, as a decoding step has it: the keys split among programs.

One program of the ordinary kernel walks all keys of a head, so a batch of one with eight key heads keeps
eight multiprocessors busy. Here a program takes one part of the keys and all query heads that share them, as
rows of one tile, so that a key is read once; a second kernel joins the parts:

    part s:  m_s = max S,  l_s = sum exp2(S - m_s),  a_s = sum exp2(S - m_s) v          float32
    joined:  m = max m_s,  l = sum l_s exp2(m_s - m),  y = sum a_s exp2(m_s - m) / l

Dao et al. 2023, "Flash-Decoding for long-context inference". The number of parts is a formula of lengths and
of the device's multiprocessors, and they are joined in their order: equal calls give equal bits.
y and `stats` are those of the ordinary kernel, so its backward kernels follow as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.kernels import attention_tail, config_table
from fusekit.kernels._triton import tl, triton
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_launch import _broadcast, _constants, _padded, _score_numbers
from fusekit.kernels.attention_rows import Rows
from fusekit.kernels.attention_tail import cut_off
from fusekit.kernels.attention_tiles import capped_scores, head_offset, load_rows, mask_scores
from fusekit.kernels.launch import capability, launch, recording

MOST_QUERIES = 16
# Fields of a form, beyond what libraries know.
FIELDS = frozenset({"slopes", "places", "documents", "key_documents"})
LEAST_KEYS = 128  # that are seen: fewer are one program's short walk, and a second kernel costs more
MOST_PARTS = 128
PROGRAMS_PER_SM = 2
# (block of keys, warps, stages) by padded head dimension: bytes in flight for two programs a multiprocessor.
CONFIGS = {64: (64, 4, 3), 128: (64, 4, 2), 256: (32, 4, 2)}
CONFIGS_MASKED = {64: (64, 4, 3), 128: (32, 4, 2), 256: (16, 4, 2)}
# float32 products keep their operands in registers, as those of the ordinary kernel do.
CONFIGS_FLOAT32 = {64: (16, 8, 1), 128: (16, 8, 1)}  # of 256 features they spill: not taken
# Of a tile. With 64 the products are wgmma's, which Triton serialises beside masks, and registers spill.
MOST_ROWS, MOST_ROWS_FLOAT32 = 32, 16
BLOCK_COLUMNS = 64  # features of one program of the joining kernel
BLOCK_PARTS = 16


class Split(NamedTuple):
    """first: where the first part starts. last: behind the last key. keys: of one part, whole blocks."""

    first: int
    last: int
    keys: int
    parts: int


# A cache grows by a key a step: what changes with it must not be compiled for anew.
GROWING = [
    "Tq", "Tk", "rows_total", "low", "high", "offset", "first_key", "last_key", "part_keys", "parts",
    "stride_pb", "stride_eb", "stride_fb",
]  # fmt: skip


@triton.jit(do_not_specialize=GROWING)
def _part_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, places_ptr, documents_ptr, key_documents_ptr,
    acc_ptr, totals_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_sb, stride_sh, stride_pb, stride_eb, stride_fb,  # of slopes, places, documents, key_documents
    H, GROUP, Tq, Tk, rows_total, scale_log2, cap_log2, low, high, offset,
    first_key, last_key, part_keys, parts,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, BAND: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Row r of a key head: query r % Tq of the group's member r // Tq.
    part = tl.program_id(1)
    blocks = tl.cdiv(GROUP * Tq, BLOCK_M)
    kv_index = tl.program_id(0) // blocks
    KV_HEADS = H // GROUP
    batch, kv_head = kv_index // KV_HEADS, kv_index % KV_HEADS
    r = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = r < GROUP * Tq
    member = r // Tq
    m = tl.where(exists, r % Tq, Tq)  # a row too many is no query: no mask is read for it
    heads = kv_head * GROUP + member
    q_ptr += head_offset(stride_qb, stride_qh, batch, kv_head * GROUP)
    features = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + (member.to(tl.int64) * stride_qh + m.to(tl.int64) * stride_qm)[:, None]
    inside = exists[:, None] & (features[None, :] < D)
    q = tl.load(q_ptrs + features[None, :] * stride_qd, mask=inside, other=0.0)
    k_ptr += head_offset(stride_kb, stride_kh, batch, kv_head)
    v_ptr += head_offset(stride_vb, stride_vh, batch, kv_head)
    mask_rows = mask_ptr
    if MASK != 0:
        mask_rows = mask_ptr + (batch.to(tl.int64) * stride_mb + heads.to(tl.int64) * stride_mh)[:, None]
    slopes = 0.0
    if ALIBI != 0:
        slopes_ptr += batch * stride_sb
        slopes = tl.load(slopes_ptr + heads * stride_sh, mask=exists, other=0.0)
        slopes = (slopes.to(tl.float32) * 1.4426950408889634)[:, None]
    if ALIBI == 2:
        places_ptr += batch.to(tl.int64) * stride_pb
    if DOCUMENTS:
        documents_ptr += batch.to(tl.int64) * stride_eb
        key_documents_ptr += batch.to(tl.int64) * stride_fb

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    first = first_key + part * part_keys
    last = tl.minimum(last_key, first + part_keys)
    for start in tl.range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, stride_kn, stride_kd, Tk, D, BLOCK_D)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = capped_scores(products, scale_log2, cap_log2, CAP)
        scores = mask_scores(
            scores, m[:, None], n[None, :], mask_rows, stride_mm, stride_mn, slopes, places_ptr,
            documents_ptr, key_documents_ptr, None, None, Tq, Tk, low, high, offset,
            MASK, BAND, True, ALIBI, DOCUMENTS, 0,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(largest - base)
        total = total * rescale + tl.sum(p, 1)
        v = load_rows(v_ptr, n, stride_vn, stride_vd, Tk, DV, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        largest = new_largest

    rows = part.to(tl.int64) * rows_total + (batch * H + heads).to(tl.int64) * Tq + m
    columns = tl.arange(0, BLOCK_DV)
    acc_ptrs = acc_ptr + rows[:, None] * DV + columns[None, :]
    tl.store(acc_ptrs, acc, mask=exists[:, None] & (columns[None, :] < DV))
    tl.store(totals_ptr + rows, largest, mask=exists)
    tl.store(totals_ptr + parts.to(tl.int64) * rows_total + rows, total, mask=exists)


@triton.jit(do_not_specialize=["Tq", "rows_total", "parts"])
def _join_kernel(
    acc_ptr, totals_ptr, sinks_ptr, out_ptr, tail_ptr, stats_ptr, H, Tq, rows_total, parts,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, MOST: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    ADDITIVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head_index = row // Tq
    head = head_index % H
    every = tl.arange(0, MOST)
    totals_ptr += row
    tops = tl.load(totals_ptr + every.to(tl.int64) * rows_total, mask=every < parts, other=float("-inf"))
    sums = tl.load(totals_ptr + (parts + every).to(tl.int64) * rows_total, mask=every < parts, other=0.0)
    largest = tl.max(tops, 0)
    sink = float("-inf")
    if sinks_ptr is not None:  # one logit more in the sum, which brings no value
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        largest = tl.maximum(largest, sink)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(sums * tl.exp2(tops - base), 0)
    if sinks_ptr is not None:
        total += tl.exp2(sink - base)

    columns = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for start in tl.range(0, parts, BLOCK_PARTS):
        s = start + tl.arange(0, BLOCK_PARTS)
        top = tl.load(totals_ptr + s.to(tl.int64) * rows_total, mask=s < parts, other=float("-inf"))
        ptrs = acc_ptr + (s.to(tl.int64) * rows_total + row)[:, None] * DV + columns[None, :]
        block = tl.load(ptrs, mask=(s < parts)[:, None] & (columns < DV)[None, :], other=0.0)
        acc += tl.sum(block * tl.exp2(top - base)[:, None], 0)

    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)
    batch, query = head_index // H, row % Tq
    places = ((batch * Tq + query) * H + head) * DV + columns
    rounded = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, rounded, mask=columns < DV)
    if tail_ptr is not None:
        tl.store(tail_ptr + places, cut_off(out, rounded), mask=columns < DV)
    if tl.program_id(1) == 0:
        if ADDITIVE:
            tl.store(stats_ptr + row, tl.where(empty, float("inf"), largest))
            tl.store(stats_ptr + rows_total + row, tl.log2(tl.where(empty, 1.0, total)))
        else:
            tl.store(stats_ptr + row, tl.where(empty, float("inf"), largest + tl.log2(total)))


def takes(q: Tensor, k: Tensor, v: Tensor, form: Form) -> bool:
    """Whether the keys are many for the queries, and something is gained by splitting or sharing them."""
    if q.shape[-2] > MOST_QUERIES or q.numel() == 0 or form.dropout > 0.0:
        return False
    if q.dtype == torch.float32 and _widest(q, v) not in CONFIGS_FLOAT32:
        return False
    if _crowded(q, v, form):
        return False
    first, last = _seen(q.shape[-2], k.shape[-2], form)
    if last - first < LEAST_KEYS:
        return False
    return q.shape[1] != k.shape[1] or split(q, k, v, form).parts > 1


def _crowded(q: Tensor, v: Tensor, form: Form) -> bool:
    """Whether slopes or documents meet what the kernel was not compiled with, or spills registers with."""
    if form.documents is not None:
        return form.demands > 1 or _widest(q, v) > (64 if q.dtype == torch.float32 else 128)
    return form.slopes is not None and form.softcap is not None


def split(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Split:
    """Parts for two programs a multiprocessor, of whole blocks of keys."""
    block_m, (block_n, _, _) = _rows(q, k), _config(q, v, form)
    first, last = _seen(q.shape[-2], k.shape[-2], form)
    first -= first % block_n
    programs = k.shape[0] * k.shape[1] * -(-(q.shape[1] // k.shape[1] * q.shape[-2]) // block_m)
    wanted = min(MOST_PARTS, max(1, PROGRAMS_PER_SM * multiprocessors(q) // programs))
    keys = -(-(last - first) // (wanted * block_n)) * block_n
    return Split(first, last, keys, -(-(last - first) // keys))


def _seen(Tq: int, Tk: int, form: Form) -> tuple[int, int]:
    """The keys that any query sees by its place lie in between."""
    low, high = form.band
    return max(0, low), min(Tk, Tq + high)


def _rows(q: Tensor, k: Tensor) -> int:
    most = MOST_ROWS_FLOAT32 if q.dtype == torch.float32 else MOST_ROWS
    return min(most, _padded(q.shape[1] // k.shape[1] * q.shape[-2]))


def _config(q: Tensor, v: Tensor, form: Form) -> tuple[int, int, int]:
    if q.dtype == torch.float32:
        return CONFIGS_FLOAT32[_widest(q, v)]
    masked = any(given is not None for given in (form.mask, form.slopes, form.documents))
    return (CONFIGS_MASKED if masked else CONFIGS)[_widest(q, v)]


def _widest(q: Tensor, v: Tensor) -> int:
    return max(64, _padded(max(q.shape[-1], v.shape[-1])))


def multiprocessors(q: Tensor) -> int:
    if recording():
        return config_table.load(config_table.target_of(capability(q))).sms
    return config_table.for_device(q.device.index or 0).sms


def forward(
    q: Tensor, k: Tensor, v: Tensor, form: Form, tail: int = attention_tail.NONE
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, Tq, DV) in (B, Tq, H, DV) memory, stats and tail, as the ordinary kernel leaves them."""
    (B, H, Tq, _), (_, kv_heads, Tk, DV) = q.shape, v.shape
    mask, mask_strides = _broadcast(form.mask, q, k)
    block_m, (block_n, warps, stages) = _rows(q, k), _config(q, v, form)
    constants = _constants(q, v, form, block_m, block_n)
    for absent in ("DROPOUT", "GLOBALS"):
        del constants[absent]
    first, last, keys, parts = split(q, k, v, form)
    group, rows = H // kv_heads, B * H * Tq
    acc = q.new_empty((parts, rows, DV), dtype=torch.float32)
    totals = q.new_empty((2, parts, rows), dtype=torch.float32)  # largest scores and sums
    scale_log2, cap_log2, low, high, offset = _score_numbers(form)
    given = Rows.of(form, q, k)
    launch(
        _part_kernel, (B * kv_heads * triton.cdiv(group * Tq, block_m), parts),
        q, k, v, mask, given.slopes, given.places, given.documents, given.key_documents, acc, totals,
        *q.stride(), *k.stride(), *v.stride(), *mask_strides, *given.strides[:5],
        H, group, Tq, Tk, rows, scale_log2, cap_log2, low, high, offset, first, last, keys, parts,
        **constants, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    additive = mask is not None and mask.dtype != torch.uint8
    out = q.new_empty((B, Tq, H, DV))
    stats = q.new_empty((1 + additive, B, H, Tq), dtype=torch.float32)
    cut = attention_tail.empty(q, v, tail)
    launch(
        _join_kernel, (rows, triton.cdiv(DV, BLOCK_COLUMNS)),
        acc, totals, form.sinks, out, attention_tail.given(cut), stats, H, Tq, rows, parts,
        DV=DV, BLOCK_DV=BLOCK_COLUMNS, MOST=MOST_PARTS, BLOCK_PARTS=BLOCK_PARTS, ADDITIVE=additive,
        num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2), stats, cut
