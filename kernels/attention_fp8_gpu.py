r"""Triton kernel of `attention_fp8`'s forward pass, and the launchers of both passes.

    S = scale log2(e) inverse_q inverse_k code_q code_k^T,   E = 2^(S - base),   p = R(E)
    y = inverse_v (p code_v^T) / rowsum(p)

base is a whole number, so that a larger one rescales what was summed by a power of two, exactly. Sums of
p code_v leave the tensor core after every block of keys: p has one sign, and Hopper's FP8 accumulator cuts
long sums towards zero. `stats`, (2, B, H, Tq) in float32, is left for the backward pass: base, +inf for a row
without keys, and 1 / rowsum(p). The backward pass is attention's own, over the values of the codes, with P
made of p again.

Where there is no FP8 (Ampere) codes become float16 in registers, 2^-8 of their value: every product is exact.
Shape suffixes: M queries, N keys, D and DV features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import attention_launch, attention_tail
from fusekit.kernels._triton import tl, triton
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_fp8_cast import Codes, cast, decode_e4m3, values
from fusekit.kernels.attention_fp8_format import BLOCK, CODE
from fusekit.kernels.attention_rows import Rows
from fusekit.kernels.attention_tail import cut_off
from fusekit.kernels.attention_tiles import (
    BAND,
    CAUSAL,
    FULL,
    LOG2E,
    keys_seen,
    mask_scores,
    round_to_e4m3,
    store_rows,
    within,
)
from fusekit.kernels.fp8_gemm import multiplies_fp8
from fusekit.kernels.launch import capability, launch

# (block of queries, block of keys, warps, stages) by padded head dimension; both blocks divide 128. The more
# keys, the fewer instructions a score: the output is rescaled once a block.
CONFIGS = {64: (128, 64, 8, 3), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)}
NARROWER = {**CONFIGS, 128: (128, 64, 8, 3)}  # documents; windows on Blackwell: they spill with 128 keys
DECODED = {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 1)}


@triton.jit
def _load_codes(ptrs, inside, WHOLE: tl.constexpr):
    return tl.load(ptrs) if WHOLE else tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _fp8_blocks(
    acc, total, base, q, k_ptr, v_ptr, k_inverse_ptr, v_inverse_ptr, documents_ptr, key_documents_ptr, m,
    first, last, factor, TOKENS, Tq, Tk, low, high,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BAND: tl.constexpr, BOUNDED: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCKS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for start in tl.range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _load_codes(k_ptr + n[:, None] * D + d[None, :], (d < D)[None, :], D == BLOCK_D)
        if not NATIVE:
            k = decode_e4m3(k)
        products = tl.dot(q, tl.trans(k))
        scaling = factor
        if BLOCKS:
            scaling *= tl.load(k_inverse_ptr + start // GROUP_ROWS)
        scores = products * scaling
        if BOUNDED:
            scores = mask_scores(
                scores, m[:, None], n[None, :], documents_ptr, 0, 0, 0.0, documents_ptr, documents_ptr,
                key_documents_ptr, documents_ptr, documents_ptr, Tq, Tk, low, high, 0,
                0, BAND, True, 0, DOCUMENTS, 0,
            )  # fmt: skip
        # scaling is positive: a product for each row and not for each score
        highest = tl.max(scores, 1) if BOUNDED else tl.max(products, 1) * scaling
        new_base = tl.maximum(base, tl.ceil(highest) - 8.0)
        # A masked row may have met no key yet, and -inf - -inf is NaN. Else every row meets key 0 at once.
        finite_base = new_base
        if BAND == 2 or DOCUMENTS:
            finite_base = tl.where(new_base == float("-inf"), 0.0, new_base)
        p = round_to_e4m3(tl.exp2(scores - finite_base[:, None]))
        rescale = tl.exp2(base - finite_base)
        total = total * rescale + tl.sum(p, 1)
        v = _load_codes(v_ptr + dv[None, :] * TOKENS + n[:, None], (dv < DV)[None, :], DV == BLOCK_DV)
        product = tl.dot(p.to(tl.float8e4nv), v) if NATIVE else tl.dot(p.to(tl.float16), decode_e4m3(v))
        if BLOCKS:
            product *= tl.load(v_inverse_ptr + start // GROUP_ROWS)
        acc = acc * rescale[:, None] + product
        base = new_base
    return acc, total, base


@triton.jit
def fp8_forward_kernel(
    q_ptr, k_ptr, v_ptr, q_inverse_ptr, k_inverse_ptr, v_inverse_ptr, documents_ptr, key_documents_ptr,
    ranges_ptr, out_ptr, tail_ptr, stats_ptr, stride_db, stride_eb,
    H, GROUP, Tq, Tk, Q_TOKENS, TOKENS, rows_total, scale_log2, low, high,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BAND: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Q_TOKENS, TOKENS: of a head of codes, padded. BLOCKS: each GROUP_ROWS tokens have a scale."""
    blocks = tl.cdiv(Tq, BLOCK_M)
    head_index = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first
    batch, head = head_index // H, head_index % H
    key_index = batch * (H // GROUP) + head // GROUP
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q_ptr += head_index.to(tl.int64) * Q_TOKENS * D
    q = _load_codes(q_ptr + m[:, None] * D + d[None, :], (d < D)[None, :], D == BLOCK_D)
    k_ptr += key_index.to(tl.int64) * TOKENS * D
    v_ptr += key_index.to(tl.int64) * TOKENS * DV
    if BLOCKS:
        factor = scale_log2 * tl.load(q_inverse_ptr + (head_index * Q_TOKENS + block * BLOCK_M) // GROUP_ROWS)
        k_inverse_ptr += key_index * (TOKENS // GROUP_ROWS)
        v_inverse_ptr += key_index * (TOKENS // GROUP_ROWS)
    else:
        factor = scale_log2 * tl.load(q_inverse_ptr + head_index) * tl.load(k_inverse_ptr + key_index)
    if not NATIVE:
        q = decode_e4m3(q)
        factor *= 65536.0
    if DOCUMENTS:
        documents_ptr += batch.to(tl.int64) * stride_db
        key_documents_ptr += batch.to(tl.int64) * stride_eb

    first, last = keys_seen(block, Tk, low, high, BLOCK_M, BLOCK_N, BAND)
    if DOCUMENTS:
        first, last = within(first, last, ranges_ptr, batch, block, blocks, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    base = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if not DOCUMENTS:  # which are read everywhere
        # Blocks of keys from `first_whole` to `last_whole` are seen by every row: they need no test.
        first_whole = first
        last_whole = Tk
        if BAND == 1:
            last_whole = tl.minimum(Tk, block * BLOCK_M + 1)
        if BAND == 2:
            first_whole = tl.cdiv(tl.maximum(0, (block + 1) * BLOCK_M - 1 + low), BLOCK_N) * BLOCK_N
            first_whole = tl.maximum(first, tl.minimum(first_whole, last))
            last_whole = tl.minimum(Tk, block * BLOCK_M + high + 1)
            acc, total, base = _fp8_blocks(
                acc, total, base, q, k_ptr, v_ptr, k_inverse_ptr, v_inverse_ptr, documents_ptr,
                key_documents_ptr, m, first, first_whole, factor, TOKENS, Tq, Tk, low, high,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, GROUP_ROWS, BAND, True, DOCUMENTS, BLOCKS, NATIVE,
            )  # fmt: skip
        last_whole = tl.maximum(first_whole, last_whole // BLOCK_N * BLOCK_N)
        acc, total, base = _fp8_blocks(
            acc, total, base, q, k_ptr, v_ptr, k_inverse_ptr, v_inverse_ptr, documents_ptr, key_documents_ptr,
            m, first_whole, last_whole, factor, TOKENS, Tq, Tk, low, high,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, GROUP_ROWS, 0, False, DOCUMENTS, BLOCKS, NATIVE,
        )  # fmt: skip
        first = last_whole
    acc, total, base = _fp8_blocks(
        acc, total, base, q, k_ptr, v_ptr, k_inverse_ptr, v_inverse_ptr, documents_ptr, key_documents_ptr,
        m, first, last, factor, TOKENS, Tq, Tk, low, high,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, GROUP_ROWS, BAND, True, DOCUMENTS, BLOCKS, NATIVE,
    )  # fmt: skip

    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    factor_out = inverse
    if not BLOCKS:
        factor_out *= tl.load(v_inverse_ptr + key_index)
    if not NATIVE:
        factor_out *= 256.0
    first_row = (batch.to(tl.int64) * Tq * H + head) * DV
    out = acc * factor_out[:, None]
    rounded = out.to(out_ptr.dtype.element_ty)
    store_rows(out_ptr + first_row, m, H * DV, rounded, Tq, DV, BLOCK_DV)
    if tail_ptr is not None:
        store_rows(tail_ptr + first_row, m, H * DV, cut_off(out, rounded), Tq, DV, BLOCK_DV)
    rows = head_index.to(tl.int64) * Tq + m
    tl.store(stats_ptr + rows, tl.where(empty, float("inf"), base), mask=m < Tq)
    tl.store(stats_ptr + rows_total + rows, inverse, mask=m < Tq)


def _configs(q: Tensor, form: Form, native: bool) -> dict[int, tuple[int, int, int, int]]:
    if not native:
        return DECODED
    narrow = form.documents is not None or (form.is_banded and capability(q)[0] >= 10)
    return NARROWER if narrow else CONFIGS


def _block(features: int) -> int:
    return max(32, triton.next_power_of_2(features))  # a step of an FP8 product is 32 deep


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form,
    scaling: str,
    native: bool | None = None,
    tail: int = attention_tail.NONE,
) -> tuple[Tensor, Tensor, Tensor, Codes, Codes, Codes]:
    """out (B, H, Tq, DV) in (B, Tq, H, DV) memory, stats, the tail of out, and the codes of q, k and v.

    native: whether products are FP8's own; by default where the device has them.
    """
    (B, H, Tq, D), Tk, DV = q.shape, k.shape[-2], v.shape[-1]
    native = multiplies_fp8(q) if native is None else native
    operands = cast(q, scaling), cast(k, scaling), cast(v, scaling, transposed=True)
    codes = [held.codes.view(CODE) if native else held.codes for held in operands]
    widest = max(64, _block(D), _block(DV))
    block_m, block_n, warps, stages = _configs(q, form, native)[widest]
    out = q.new_empty((B, Tq, H, DV))
    stats = q.new_empty((2, B, H, Tq), dtype=torch.float32)
    cut = attention_tail.empty(q, v, tail)
    if not Tk:  # and no scales either
        stats[0], stats[1] = float("inf"), 1.0
        return out.zero_().transpose(1, 2), stats, cut.zero_(), *operands
    rows = Rows.of(form, q, k)
    low, high = form.band if form.is_banded else (None, None)
    launch(
        fp8_forward_kernel, (B * H * triton.cdiv(Tq, block_m),),
        *codes, *(held.inverse for held in operands), rows.documents, rows.key_documents,
        rows.key_ranges(block_m), out, attention_tail.given(cut), stats, *rows.strides[3:5],
        H, H // k.shape[1], Tq, Tk, codes[0].shape[2], codes[1].shape[2], B * H * Tq, form.scale * LOG2E,
        low, high,
        D=D, DV=DV, BLOCK_D=_block(D), BLOCK_DV=_block(DV), BLOCK_M=block_m, BLOCK_N=block_n,
        GROUP_ROWS=BLOCK, BAND=BAND if form.is_banded else CAUSAL if form.causal else FULL,
        DOCUMENTS=form.documents is not None, BLOCKS=scaling == "block", NATIVE=native, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out.transpose(1, 2), stats, cut, *operands


def backward(
    grad_output: Tensor, operands: tuple[Codes, Codes, Codes], out: Tensor, stats: Tensor, tail: Tensor,
    form: Form, scaling: str, lengths: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, each laid out as (B, T, H, D). lengths: of queries and of keys.

    In float32 products are tf32's, in which values of codes are exact."""
    dtype, (Tq, Tk) = grad_output.dtype, lengths
    form = form._replace(tf32=dtype == torch.float32)
    q, k = (values(held, scaling, T, dtype) for held, T in zip(operands, (Tq, Tk), strict=False))
    v = values(operands[2], scaling, Tk, dtype, transposed=True)
    return attention_launch.backward(grad_output, q, k, v, out, stats, tail, form, False, rounded=True)[:3]
