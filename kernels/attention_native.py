r"""`attention` on a CPU: torch's blocked flash kernel where it applies, else matmuls and a softmax.

The flash kernel takes shared key heads, strides and any mask that broadcasts, but a boolean mask only as 0
and -inf. It is asked to work in float32 where oneDNN has no 16-bit matrix units, since its 16-bit products
then run in scalar code: B=8 H=6 T=256 D=64 causal on an AVX2 machine, one thread, bfloat16, forward and
backward, 17 and 289 ms as it comes, 17 and 39 ms through float32 (which also spares the rounding of P).

Its backward pass always is. In 16 bits it adds the gradients of blocks, and of heads that share keys, in
memory of 16 bits: on a machine with AMX dk is 2.8 rounding floors off at 512 tokens, 5.2 at 8192 and 4.4
where four heads share keys, and 1.1 through float32. One thread there, H=4 causal, bfloat16 and float32:
12 and 5 ms at B=8 T=128 D=64, 47 and 57 at T=2048, 59 and 117 at T=2048 D=128. The forward pass in bfloat16
is 1.2 to 1.4 floors off and two to three times as fast as in float32; in float16 (AVX512-FP16) it gains
nothing, so that is widened everywhere.

One query of heads that share keys, as a decoding step has it, is taken as one head with a row for each: a
key is then read once.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fusekit.kernels import attention_cpu, philox
from fusekit.kernels.attention_form import GLOBAL, Form

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# exp(S - lse) with a large lse has lost what float32 cannot hold next to it: then softmax is done again.
LARGEST_LSE = 1024.0


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dropout: float, seed: Tensor | None, seed_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Tq, Dv) in (B, Tq, H, Dv) memory, and stats: lse, and a plane more with an additive mask."""
    B, H, Tq, _ = q.shape
    out = q.new_empty((B, Tq, H, v.shape[-1])).transpose(1, 2)
    if _is_one_row(q, k, mask, causal, dropout):
        rows, stats = forward(_as_rows(q, k), k, v, mask, causal, scale, dropout, seed, seed_offset)
        return out.copy_(rows.reshape(out.shape)), stats.reshape(-1, B, H, Tq)
    stats = q.new_zeros((1 + (mask is not None and mask.dtype != torch.bool), B, H, Tq), dtype=torch.float32)
    if attention_cpu.takes(q, k, v, mask, dropout):
        attention_cpu.forward(q, k, v, causal, scale, out, stats)
        return out, stats
    if _flash_fits(q, k, v, dropout):
        dtype = _compute_dtype(q.dtype)
        added = _additive(mask, q, dtype)
        result, lse = _flash(*_cast(dtype, q, k, v), 0.0, causal, attn_mask=added, scale=scale)
        stats[0].copy_(lse)
        return result if result.dtype == out.dtype else out.copy_(result), stats
    for b in range(B):  # one batch element's scores at a time
        p = _probabilities(q, k, mask, causal, scale, b)
        p = _drop(p, _kept(p, dropout, seed, seed_offset, b), dropout)
        out[b].copy_(_shared(p @ _precise(v[b]), H))
    return out, stats


def backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, mask: Tensor | None,
    causal: bool, scale: float, dropout: float, seed: Tensor | None, seed_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, each laid out as (B, T, H, D)."""
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    # Of a few rows in all, P by the rounded lse of each is more than float32's limit off now and then.
    softmax_again = _is_one_row(q, k, mask, causal, dropout)
    if not softmax_again and attention_cpu.takes(q, k, v, mask, dropout):
        attention_cpu.backward(grad_output, q, k, v, stats, causal, scale, dq, dk, dv)
        return dq, dk, dv
    softmax_again |= len(stats) == 2 and bool((stats[0].abs() > LARGEST_LSE).any())
    if _flash_fits(q, k, v, dropout) and not softmax_again:
        operands = _cast(torch.float32, grad_output, q, k, v)
        added = _additive(mask, q, torch.float32)
        if out.dtype != torch.float32:
            # Where P is near uniform dS cancels, and would show that out was rounded: dk was 6 floors off in
            # a GPT after 19 steps.
            out, _ = _flash(*operands[1:], 0.0, causal, attn_mask=added, scale=scale)
        grads = _flash_backward(*operands, out, stats[0], 0.0, causal, attn_mask=added, scale=scale)
        if grads[0].dtype == q.dtype:
            return grads
        return dq.copy_(grads[0]), dk.copy_(grads[1]), dv.copy_(grads[2])
    for b in range(q.shape[0]):
        p = _probabilities(q, k, mask, causal, scale, b)
        kept = _kept(p, dropout, seed, seed_offset, b)
        dy = _grouped(grad_output[b], k.shape[1])
        dv[b].copy_(_drop(p, kept, dropout).transpose(-1, -2) @ dy)
        dp = _drop(dy @ _precise(v[b]).transpose(-1, -2), kept, dropout)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[b].copy_(_shared(ds @ _precise(k[b]), q.shape[1]))
        dk[b].copy_(ds.transpose(-1, -2) @ _grouped(q[b], k.shape[1]))
    return dq, dk, dv


def _is_one_row(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> bool:
    """One query whose heads share keys and see the same of them."""
    shared = q.shape[-2] == 1 and q.shape[1] != k.shape[1] and q.numel() > 0
    same = mask is None or mask.ndim < 3 or mask.shape[-3] == 1
    return shared and same and not causal and not dropout


def _as_rows(x: Tensor, k: Tensor) -> Tensor:
    """(B, H, 1, D) as (B, Hkv, G, D): what follows takes the heads of a group for queries."""
    return x.reshape(x.shape[0], k.shape[1], x.shape[1] // k.shape[1], x.shape[-1])


def path(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str:
    """Who runs a call on a CPU, in words."""
    if form.has_globals:
        return f"blocks: {GLOBAL}"
    if form.is_banded:
        return "blocks: window" if form.window is not None else "blocks: causal with an offset"
    if not form.is_plain:
        given = {"capped scores": form.softcap, "sinks": form.sinks, "ALiBi": form.slopes}
        return f"blocks: {next((name for name, x in given.items() if x is not None), 'documents')}"
    if attention_cpu.takes(q, k, v, form.mask, form.dropout):
        return "C++ pass"
    if not _flash_fits(q, k, v, form.dropout):
        return "matmuls: dropout" if form.dropout else "matmuls: values of another width"
    return "flash" if _compute_dtype(q.dtype) == q.dtype else "flash in float32"


def _flash_fits(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
    """The kernel draws other dropout numbers, wants equal head dimensions, and divides by empty sizes."""
    return dropout == 0.0 and q.shape[-1] == v.shape[-1] and q.numel() > 0 and k.numel() > 0


@functools.cache
def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the flash kernel's forward pass computes in."""
    multiplied = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if multiplied else torch.float32


def _cast(dtype: torch.dtype, *operands: Tensor) -> tuple[Tensor, ...]:
    """In dtype, features adjacent: the kernel reads them so without asking."""
    return tuple(x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in operands)


def _additive(mask: Tensor | None, q: Tensor, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)
    elif mask.dtype != torch.float32:
        mask = mask.to(torch.float32 if mask.dtype != dtype else dtype)
    return mask.expand(*(1,) * (4 - mask.ndim), *mask.shape)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.float32)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(H, T, D) as (Hkv, G T, D): the query heads of a group become rows of one matmul."""
    return _precise(x).reshape(kv_heads, x.shape[0] // kv_heads * x.shape[1], x.shape[-1])


def _shared(x: Tensor, heads: int) -> Tensor:
    """Back from (Hkv, G T, D) to (H, T, D)."""
    return x.reshape(heads, x.shape[0] * x.shape[1] // heads, x.shape[-1])


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, b: int) -> Tensor:
    """P of batch element b in float32, (Hkv, G Tq, Tk)."""
    (_, H, Tq, _), (_, kv_heads, Tk, _) = q.shape, k.shape
    scores = (_grouped(q[b], kv_heads) @ _precise(k[b]).transpose(-1, -2)).view(H, Tq, Tk).mul_(scale)
    if causal:
        scores.masked_fill_(torch.ones(Tq, Tk, dtype=torch.bool).triu_(1), -math.inf)
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], Tk)[b]
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    p = scores.softmax(-1)
    if mask is not None and Tk:
        p.masked_fill_(scores.amax(-1, keepdim=True) == -math.inf, 0.0)  # rows without keys: NaN so far
    return p.view(kv_heads, H // kv_heads * Tq, Tk)


def _kept(p: Tensor, dropout: float, seed: Tensor | None, seed_offset: int, b: int) -> Tensor | None:
    if dropout == 0.0:
        return None
    assert seed is not None, "supports() refuses dropout without a seed"
    draws = philox.uniform(seed, p.numel(), p.device, start=b * p.numel(), seed_offset=seed_offset)
    return draws.view(p.shape) >= dropout


def _drop(x: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    return x if kept is None else torch.where(kept, x * (1.0 / (1.0 - dropout)), 0.0)
