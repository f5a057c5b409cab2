"""Launchers of the Triton kernels of `attention`, and the tiles each kernel is started with."""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import attention_tail
from fusekit.kernels._triton import triton
from fusekit.kernels.attention_bias import grad_bias_kernel
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_kernels import _forward_kernel, _grad_key_value_kernel, _grad_query_kernel
from fusekit.kernels.attention_rows import Rows
from fusekit.kernels.attention_tiles import (
    ADDITIVE_MASK,
    AHEAD,
    BAND,
    BEHIND,
    BOOL_MASK,
    CAPPED,
    CAPPED_EXACTLY,
    CAUSAL,
    FULL,
    INDICES,
    LOG2E,
    NO_ALIBI,
    NO_GLOBALS,
    NO_MASK,
    PLACES,
    UNCAPPED,
)
from fusekit.kernels.config_table import target_of
from fusekit.kernels.launch import capability, launch

# (block of queries, block of keys, warps, stages) by kernel and padded head dimension: plain or causal; with
# a mask; with dropout. Large tiles that triton 3.6 compiles for sm_90 without spills or serialised wgmma.
# Mask tiles are small and not pipelined: a thread reads its elements one by one, an address of 64 bits each.
# Philox takes registers too.
CONFIGS = {
    "forward": {
        64: ((128, 64, 8, 3), (128, 32, 8, 1), (128, 32, 8, 2)),
        128: ((128, 64, 8, 3), (64, 16, 8, 1), (128, 32, 8, 2)),
        256: ((64, 32, 8, 2), (64, 16, 8, 1), (64, 16, 8, 1)),
    },
    "grad_query": {
        64: ((128, 64, 8, 3), (64, 32, 4, 1), (64, 32, 4, 2)),
        128: ((128, 32, 8, 2), (32, 32, 4, 1), (128, 32, 8, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1)),
    },
    "grad_key_value": {
        64: ((64, 128, 8, 2), (32, 64, 8, 1), (32, 128, 8, 2)),
        128: ((64, 128, 8, 2), (32, 64, 8, 1), (16, 128, 8, 2)),
        256: ((32, 32, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    },
    "grad_bias": {
        64: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        128: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        256: ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    },
}
# Measured on an H100 (benchmarks/results/attention_tiles_h100.json): 16 bits, full or causal, features that
# fill the padding, heads that do not share keys.
CONFIGS_SM90 = {
    ("forward", 64): (128, 64, 4, 3), ("forward", 128): (128, 128, 8, 3),
    ("grad_query", 128): (64, 64, 4, 2),
    ("grad_key_value", 64): (64, 64, 4, 2),
}  # fmt: skip
# grad_key_value, no mask: heads that share keys, bands, caps, ALiBi, documents; features that do not fill
# 128; 128 features on sm_80, where Triton 3.6 spills
NARROWER = {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 4, 1)}
FORWARD_SM80 = (128, 32, 8, 3)  # up to 32 features, features that do not fill 128, documents of these
MASKED_SM80 = (128, 16, 8, 1)  # up to 64 features
# Two or more of a mask, dropout, a cap, ALiBi, documents and global tokens: registers for all of them.
COMBINED = {
    "forward": (32, 32, 4, 1), "grad_query": (32, 16, 4, 1), "grad_key_value": (32, 16, 4, 1),
    "grad_bias": (16, 32, 4, 1),
}  # fmt: skip
# float32 products run on the FMA units, whose operands sit in registers: small tiles, many warps.
CONFIGS_FLOAT32 = {
    "forward": {32: (16, 16, 4, 1), 64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "grad_query": {32: (32, 32, 8, 2), 64: (32, 32, 8, 2), 128: (16, 16, 8, 2), 256: (16, 32, 16, 2)},
    "grad_key_value": {32: (16, 16, 4, 1), 64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 2)},
    "grad_bias": {32: (16, 16, 4, 1), 64: (16, 16, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
# Where those spill: beyond plain and causal; and without tf32, whose products leave registers free.
FORMS_FLOAT32 = {("forward", 64): (32, 16, 16, 1), ("grad_key_value", 64): (16, 16, 8, 1)}
IEEE_FLOAT32 = {("forward", 256): (16, 16, 16, 1), ("grad_query", 256): (16, 16, 8, 3)}  # but for sm_90
IEEE_DOCUMENTS_128 = (16, 32, 8, 1)  # grad_key_value
IEEE_BAND_64_SM100 = (16, 16, 16, 1)  # grad_key_value, without global tokens
ROUNDED_FLOAT32 = (32, 16, 8, 2)  # attention_fp8, up to 32 features: with 32 keys it spills
# Beside global tokens, whose list and flags take registers.
GLOBALS = {("forward", 128): (128, 32, 8, 3)}
GLOBALS_FLOAT32 = {
    ("forward", 128): (16, 16, 16, 1), ("grad_query", 32): (16, 32, 8, 1), ("grad_query", 64): (16, 32, 8, 1),
    ("grad_key_value", 64): (16, 16, 8, 2),
}  # fmt: skip


def _padded(features: int) -> int:
    return max(16, 1 << (features - 1).bit_length())


def _blocks(
    kernel: str, q: Tensor, v: Tensor, form: Form, rounded: bool = False
) -> tuple[int, int, int, int]:
    widest = _padded(max(q.shape[-1], v.shape[-1]))
    more = q.shape[1] != v.shape[1] or form.is_banded or form.demands > 0
    if rounded and (kernel, q.dtype) == ("grad_query", torch.float32) and widest <= 32:
        return ROUNDED_FLOAT32
    if q.dtype == torch.float32:
        return _blocks_float32(kernel, max(32, widest), more, form, q)
    if form.demands > 1:
        return COMBINED[kernel]
    narrow, widest = widest <= 32, max(64, widest)
    plain, masked, dropping = CONFIGS[kernel][widest]
    if form.dropout > 0.0:
        return dropping
    if form.mask is not None:
        on_sm80 = (kernel, widest) == ("forward", 64) and target_of(capability(q)) == "sm_80"
        return MASKED_SM80 if on_sm80 else masked
    if form.has_globals and (kernel, widest) in GLOBALS:
        return GLOBALS[kernel, widest]
    if not more and not rounded and min(q.shape[-1], v.shape[-1]) == widest:
        measured = CONFIGS_SM90.get((kernel, widest))
        if measured is not None and target_of(capability(q)) == "sm_90":
            return measured
    partial = widest == 128 and min(q.shape[-1], v.shape[-1]) < 128
    on_sm80 = target_of(capability(q)) == "sm_80"
    if kernel == "forward":
        spills = narrow or (widest == 128 and (partial or form.documents is not None))
        return FORWARD_SM80 if on_sm80 and spills else plain
    if kernel == "grad_key_value" and (more or partial or (on_sm80 and widest == 128)):
        return NARROWER[widest]
    return plain


def tile(q: Tensor, v: Tensor, form: Form) -> tuple[int, int]:
    """Queries and keys of a block of the forward kernel."""
    return _blocks("forward", q, v, form)[:2]


def _blocks_float32(kernel: str, widest: int, more: bool, form: Form, q: Tensor) -> tuple[int, int, int, int]:
    if not form.tf32 and (kernel, widest) in IEEE_FLOAT32 and target_of(capability(q)) != "sm_90":
        return IEEE_FLOAT32[kernel, widest]
    if (kernel, widest) == ("grad_key_value", 128) and form.documents is not None and not form.tf32:
        return IEEE_DOCUMENTS_128
    if form.has_globals and (kernel, widest) in GLOBALS_FLOAT32:
        return GLOBALS_FLOAT32[kernel, widest]
    on_sm100 = (kernel, widest) == ("grad_key_value", 64) and target_of(capability(q)) == "sm_100"
    if on_sm100 and form.is_banded and not form.tf32:
        return IEEE_BAND_64_SM100
    base = CONFIGS_FLOAT32[kernel][widest]
    return FORMS_FLOAT32.get((kernel, widest), base) if more else base


def _constants(q: Tensor, v: Tensor, form: Form, block_m: int, block_n: int) -> dict[str, object]:
    D, DV = q.shape[-1], v.shape[-1]
    given = NO_MASK
    if form.mask is not None:
        given = BOOL_MASK if form.mask.dtype == torch.bool else ADDITIVE_MASK
    cap = UNCAPPED
    if form.softcap is not None:
        cap = CAPPED_EXACTLY if q.dtype == torch.float32 else CAPPED
    alibi = NO_ALIBI if form.slopes is None else INDICES if form.places is None else PLACES
    return {
        "D": D, "DV": DV, "BLOCK_D": _padded(D), "BLOCK_DV": _padded(DV),
        "BLOCK_M": block_m, "BLOCK_N": block_n, "MASK": given,
        "BAND": BAND if form.is_banded else CAUSAL if form.causal else FULL, "CAP": cap,
        "DROPOUT": form.dropout > 0.0, "ALIBI": alibi, "DOCUMENTS": form.documents is not None,
        "GLOBALS": NO_GLOBALS if not form.has_globals else AHEAD if form.global_ahead else BEHIND,
        "PRECISION": "tf32" if form.tf32 else "ieee",
    }  # fmt: skip


def _score_numbers(form: Form) -> tuple[float, float | None, int | None, int | None, int | None]:
    """What makes scores in log2 of products, the band, and ALiBi's offset; None for what the kernel does not
    use."""
    low, high = form.band if form.is_banded else (None, None)
    offset = None if form.slopes is None else form.offset
    if form.softcap is None:
        return form.scale * LOG2E, None, low, high, offset
    return form.scale / form.softcap, form.softcap * LOG2E, low, high, offset


def _folds(form: Form) -> bool:
    """Whether scores are products times a positive number, so that the largest product makes the largest."""
    return form.mask is None and form.softcap is None and form.slopes is None and form.scale > 0


def _broadcast(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """The mask as (B, H, Tq, Tk), broadcast dimensions at stride 0, booleans as bytes; and its strides."""
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask.expand(*q.shape[:-1], k.shape[-2])
    return mask, mask.stride()


def forward(
    q: Tensor, k: Tensor, v: Tensor, form: Form, tail: int = attention_tail.NONE
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, Tq, DV) in (B, Tq, H, DV) memory, stats, and the tail of out (attention_tail.py)."""
    (B, H, Tq, _), Tk = q.shape, k.shape[-2]
    mask, mask_strides = _broadcast(form.mask, q, k)
    block_m, block_n, warps, stages = _blocks("forward", q, v, form)
    constants = _constants(q, v, form, block_m, block_n)
    out = q.new_empty((B, Tq, H, v.shape[-1]))
    stats = q.new_empty((1 + (constants["MASK"] == ADDITIVE_MASK), B, H, Tq), dtype=torch.float32)
    cut = attention_tail.empty(q, v, tail)
    rows = Rows.of(form, q, k)
    launch(
        _forward_kernel, (B * H * triton.cdiv(Tq, block_m),),
        q, k, v, mask, form.sinks, *rows, rows.key_ranges(block_m), rows.global_key_blocks(block_n),
        form.seed, out, attention_tail.given(cut), stats,
        *q.stride(), *k.stride(), *v.stride(), *mask_strides, *rows.strides,
        H, H // k.shape[1], Tq, Tk, B * H * Tq, *_score_numbers(form), form.dropout, form.seed_offset,
        **constants, FOLDED=_folds(form), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out.transpose(1, 2), stats, cut


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, tail: Tensor, form: Form,
    bias_grad: bool, rounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv, each laid out as (B, T, H, D); the gradients of an additive mask and of sinks, or None.
    rounded: P and stats are attention_fp8's."""
    (B, H, Tq, D), (_, kv_heads, Tk, DV) = q.shape, v.shape
    mask, mask_strides = _broadcast(form.mask, q, k)
    delta = stats.new_empty((B, H, Tq))
    given = None if form.sinks is None else torch.empty_like(delta)
    dq = q.new_empty((B, Tq, H, D))
    dk, dv = k.new_empty((B, Tk, kv_heads, D)), v.new_empty((B, Tk, kv_heads, DV))
    rows = Rows.of(form, q, k)
    strides = (*dy.stride(), *q.stride(), *k.stride(), *v.stride(), *mask_strides, *rows.strides)
    scores = _score_numbers(form)
    numbers = (H, H // kv_heads, Tq, Tk, B * H * Tq, form.scale, *scores, form.dropout, form.seed_offset)

    block_m, block_n, warps, stages = _blocks("grad_query", q, v, form, rounded)
    launch(
        _grad_query_kernel, (B * H * triton.cdiv(Tq, block_m),),
        dy, q, k, v, out, attention_tail.given(tail), mask,
        *rows, rows.key_ranges(block_m), rows.global_key_blocks(block_n), form.seed, stats, delta, given, dq,
        *strides, *numbers,
        **_constants(q, v, form, block_m, block_n), ROUNDED=rounded, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_m, block_n, warps, stages = _blocks("grad_key_value", q, v, form)
    launch(
        _grad_key_value_kernel, (B * kv_heads * triton.cdiv(Tk, block_n),),
        dy, q, k, v, mask, *rows, rows.query_ranges(block_n), rows.global_query_blocks(block_m),
        form.seed, stats, delta, dk, dv,
        *strides, *numbers,
        **_constants(q, v, form, block_m, block_n), ROUNDED=rounded, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    dmask = None
    if bias_grad:
        assert form.mask is not None
        sizes = (1,) * (4 - form.mask.ndim) + tuple(form.mask.shape)
        dmask = form.mask.new_empty(sizes)
        block_m, block_n, warps, stages = _blocks("grad_bias", q, v, form)
        tiles = (triton.cdiv(sizes[2], block_m), triton.cdiv(sizes[3], block_n))
        launch(
            grad_bias_kernel, (sizes[0] * sizes[1] * tiles[0] * tiles[1],),
            dy, q, k, v, mask, *rows, form.seed, stats, delta, dmask, *strides, B, *numbers,
            **_constants(q, v, form, block_m, block_n),
            BATCHES=sizes[0] > 1 or B == 1, HEADS=sizes[1] > 1 or H == 1,
            ROWS=sizes[2] > 1, COLUMNS=sizes[3] > 1, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        dmask = dmask.view(form.mask.shape)
    dsinks = None if form.sinks is None or given is None else _grad_sinks(form.sinks, stats, given)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dmask, dsinks


def _grad_sinks(sinks: Tensor, stats: Tensor, delta: Tensor) -> Tensor:
    """A sink takes share P of each row and gives nothing: its gradient is - sum over rows of P delta."""
    p = sinks.to(torch.float32)[:, None] * LOG2E - stats[0]
    p = torch.exp2(p - stats[1] if len(stats) == 2 else p)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)
