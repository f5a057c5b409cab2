r"""Scaled dot-product attention that never stores the scores.

    S = cap(scale q k^T) + mask,   P = softmax(S) over the keys,   y = dropout(P) v
    dv = dropout(P)^T dy,   dP = dropout'(dy v^T),   delta = rowsum(dy * y),   dS = P (dP - delta)
    dq = scale cap' dS k,   dk = scale cap' dS^T q,   dmask = dS summed over what the mask repeats

cap(s) = softcap tanh(s / softcap), or s. A sink is one logit more a head in the softmax's sum, without a
value: P no longer adds up to one, and dsink = - sum over rows of P_sink delta. Which keys a query sees by its
place (causal, window, offset) stands in attention_form.py.

Dao 2023, "FlashAttention-2", arXiv:2307.08691; query heads share keys as in Ainslie et al. 2023, "GQA",
arXiv:2305.13245; capped scores: Gemma 2, arXiv:2408.00118; sinks: Xiao et al. 2023, arXiv:2309.17453.
Saved for backward: q, k, v, y and one or two float32 a row; S and P are computed again.
A row that a boolean mask (or -inf) or the band leaves no key has y = 0 and no gradient, as in torch's own
attention; a row of finfo.min in an additive mask is shared out evenly, as softmax does.
Dropout draws number ((b H + h) Tq + i) Tk + j of Philox for element (b, h, i, j), forward and backward.
Shapes: q (B, H, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), any strides; H a multiple of Hkv.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import attention_blocked, attention_choice, attention_launch, attention_native, philox
from fusekit.kernels.attention_form import UNBOUNDED, Form, band, pairs
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import define, refuse_double_backward
from fusekit.kernels.op import DTYPES, Op, Sample, not_runnable

MAX_FEATURES = 256


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    seed_offset: int = 0,
    tf32: bool = False,
    window: int | None = None,
    offset: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition, scores and all. P is rounded to q.dtype where it meets v, as a matmul needs it."""
    precise = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.to(precise) @ k.to(precise).transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal or window is not None:
        low, high = band(causal, window, offset)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(high).triu(low)
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(precise)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    if sinks is None:
        p = scores.softmax(-1)
    else:
        logits = sinks.to(precise)[:, None, None].expand(*scores.shape[:-1], 1)
        p = torch.cat((scores, logits), -1).softmax(-1)[..., :-1]
    p = p.masked_fill(empty, 0.0)
    if dropout:
        draws = philox.uniform(_drawn(seed), p.numel(), p.device, seed_offset=seed_offset).view(p.shape)
        p = p.masked_fill(draws < dropout, 0.0) / (1.0 - dropout)
    return p.to(q.dtype) @ v


def _drawn(seed: Tensor | None) -> Tensor:
    if seed is None:
        raise ValueError("attention: dropout needs a seed, one int64 element on the device of q")
    return seed


def _forward(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    form = Form(*settings)
    if on_gpu(q):
        return attention_choice.forward(q, k, v, form)
    if form.is_banded or form.softcap is not None or form.sinks is not None:
        return attention_blocked.forward(q, k, v, form)
    return attention_native.forward(q, k, v, *_native(form))


def _native(form: Form) -> tuple[Any, ...]:
    return form.mask, form.causal, form.scale, form.dropout, form.seed, form.seed_offset


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    B, H, Tq, _ = q.shape
    out = q.new_empty((B, Tq, H, v.shape[-1])).transpose(1, 2)
    two = mask is not None and mask.dtype != torch.bool
    return out, q.new_empty((1 + two, B, H, Tq), dtype=torch.float32)


def _backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, bias_grad: bool,
    *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    form = Form(*settings)
    grads: tuple[Tensor | None, ...]
    if on_gpu(q):
        grads = attention_launch.backward(grad_output, q, k, v, out, stats, form, bias_grad)
    elif form.is_banded or form.softcap is not None or form.sinks is not None or bias_grad:
        grads = attention_blocked.backward(grad_output, q, k, v, out, stats, form, bias_grad)
    else:
        grads = *attention_native.backward(grad_output, q, k, v, out, stats, *_native(form)), None, None
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, bias_grad: bool,
    *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    form = Form(*settings)
    grads = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    dmask = form.mask.new_empty(form.mask.shape) if bias_grad and form.mask is not None else q.new_empty(0)
    dsinks = q.new_empty(0) if form.sinks is None else form.sinks.new_empty(form.sinks.shape)
    return *grads, dmask, dsinks


_SETTINGS = (
    "Tensor? mask, bool causal, float scale, float dropout, Tensor? seed, int seed_offset, bool tf32, "
    "int? window, SymInt offset, float? softcap, Tensor? sinks"
)
_forward_op = define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "attention_backward(Tensor grad_output, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, "
    f"bool bias_grad, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        form = Form(*settings)
        out, stats = _forward_op(q, k, v, *form)
        ctx.save_for_backward(q, k, v, out, stats, form.mask, form.seed, form.sinks)
        ctx.form = form._replace(mask=None, seed=None, sinks=None)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward("attention")
        q, k, v, out, stats, mask, seed, sinks = ctx.saved_tensors
        form = ctx.form._replace(mask=mask, seed=seed, sinks=sinks)
        needed = ctx.needs_input_grad
        grads = _backward_op(grad_output, q, k, v, out, stats, needed[3], *form)
        wanted: list[Tensor | None] = [None] * (3 + len(form))
        for place, grad in zip((0, 1, 2, 3, len(wanted) - 1), grads, strict=True):
            wanted[place] = grad if needed[place] else None
        return tuple(wanted)


def _settings(
    q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None = None, causal: bool = False, scale: float | None = None, dropout: float = 0.0,
    seed: Tensor | None = None, seed_offset: int = 0, tf32: bool = False,
    window: int | None = None, offset: int = 0, softcap: float | None = None, sinks: Tensor | None = None,
) -> Form:  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    form = Form(mask, causal, scale, dropout, seed, seed_offset, tf32, window, offset, softcap, sinks)
    why_not = supports(q, k, v, *form)
    if why_not is not None:
        raise ValueError(f"attention: {why_not}")
    return form


def _run(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _forward_op(q, k, v, *_settings(q, k, v, *args, **kwargs))[0]


def _autograd(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Attention.apply(q, k, v, *_settings(q, k, v, *args, **kwargs))


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _forward_fake(q, k, v, None)[0]


fused = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, bool causal=False, float? scale=None, "
    "float dropout=0.0, Tensor? seed=None, int seed_offset=0, bool tf32=False, int? window=None, "
    "SymInt offset=0, float? softcap=None, Tensor? sinks=None) -> Tensor",
    _run,
    _fake,
    autograd=_autograd,
    autocast="lower",
)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    seed_offset: int = 0,
    tf32: bool = False,
    window: int | None = None,
    offset: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> str | None:
    """None, or why these arguments cannot be fused."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        return f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions, not (batch, heads, length, features)"
    if not (q.dtype == k.dtype == v.dtype):
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype"
    (B, H, _, D), (_, kv_heads, Tk, _), DV = q.shape, k.shape, v.shape[-1]
    if k.shape[0] != B or v.shape[0] != B or k.shape[-1] != D or v.shape[1] != kv_heads or v.shape[2] != Tk:
        return f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)} differ in batch, length or features"
    if kv_heads < 1 or H % kv_heads:
        return f"{H} query heads are no multiple of {kv_heads} key heads"
    if D < 1 or DV < 1 or D > MAX_FEATURES or DV > MAX_FEATURES:
        return f"heads of {max(D, DV)} features are outside 1 to {MAX_FEATURES}"
    if not 0.0 <= dropout < 1.0:
        return f"dropout {dropout} is not in [0, 1)"
    if dropout and not _is_seed(seed, q.device):
        return "dropout needs a seed, one int64 element on the device of q"
    return _form_unfit(q, window, offset, softcap, sinks) or _mask_unfit(q, k, mask) or not_runnable(q, k, v)


def _is_seed(seed: Tensor | None, device: torch.device) -> bool:
    return seed is not None and seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device


def _form_unfit(
    q: Tensor, window: int | None, offset: int, softcap: float | None, sinks: Tensor | None
) -> str | None:
    if window is not None and not 0 < window < UNBOUNDED:
        return f"a window of {window} keys is outside 1 to {UNBOUNDED - 1}"
    if isinstance(offset, int) and abs(offset) >= UNBOUNDED:
        return f"an offset of {offset} places is outside {1 - UNBOUNDED} to {UNBOUNDED - 1}"
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        return f"scores capped at {softcap}: a cap is a positive number"
    if sinks is None:
        return None
    if sinks.shape != (q.shape[1],) or sinks.dtype not in DTYPES:
        return f"sinks {_shape(sinks)} of {sinks.dtype}: one floating number for each of {q.shape[1]} heads"
    return (
        None
        if sinks.device == q.device
        else f"tensors are on different devices: {q.device} and {sinks.device}"
    )


def _mask_unfit(q: Tensor, k: Tensor, mask: Tensor | None) -> str | None:
    if mask is None:
        return None
    if mask.dtype not in (torch.bool, torch.float32, torch.float16, torch.bfloat16):
        return f"a mask is boolean or floating, not {str(mask.dtype).removeprefix('torch.')}"
    if mask.device != q.device:
        return f"tensors are on different devices: {q.device} and {mask.device}"
    scores = (*q.shape[:-1], k.shape[-2])
    fits = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.ndim > 4 or any(size != 1 and size != wanted for size, wanted in fits):
        return f"mask {_shape(mask)} does not broadcast to the scores {tuple(scores)}"
    return None


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def flops(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, *rest: Any
) -> int:
    """Two matmuls; causal and a window spare the scores that nobody sees."""
    (B, H, Tq, D), Tk, DV = q.shape, k.shape[-2], v.shape[-1]
    window, offset = (*rest[5:7], None, 0)[:2] if len(rest) > 5 else (None, 0)
    return 2 * B * H * pairs(causal, window, offset, Tq, Tk) * (D + DV)


def runs_on(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> str:
    """Who computes this call and why, as "own kernel: window"; of tensors no values are looked at."""
    return attention_choice.describe(q, k, v, _settings(q, k, v, *args, **kwargs))


def measure(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, clock: Any = None, **kwargs: Any
) -> dict[str, float]:
    """Seconds of whoever may compute this call on its GPU, kept for later calls; empty without a choice."""
    if not on_gpu(q):
        return {}
    return attention_choice.measure(q, k, v, _settings(q, k, v, *args, **kwargs), clock)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Lengths a few blocks long and no multiple of one, every kind of mask, shared heads, odd features."""

    def heads(B: int, T: int, H: int, D: int) -> Tensor:  # what .view(B, T, H, D).transpose(1, 2) gives
        x = torch.randn(B, T, H, D, generator=generator, dtype=torch.float32)
        return x.to(device, dtype).transpose(1, 2).requires_grad_()

    def qkv(B: int, H: int, kv_heads: int, Tq: int, Tk: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
        return heads(B, Tq, H, D), heads(B, Tk, kv_heads, D), heads(B, Tk, kv_heads, D)

    generator = torch.Generator().manual_seed(0)
    yield Sample(name="plain", args=qkv(1, 2, 2, 70, 70, 64))
    yield Sample(name="causal", args=(*qkv(2, 2, 2, 133, 133, 40), None, True))
    yield Sample(name="causal, grouped, longer keys", args=(*qkv(1, 4, 2, 37, 90, 16), None, True, 0.3))
    lengths = torch.tensor([61, 30]).view(2, 1, 1, 1)
    padding = (torch.arange(61) < lengths).to(device)
    yield Sample(name="padding mask", args=(*qkv(2, 2, 1, 61, 61, 32), padding))
    empty_row = (torch.rand(1, 2, 50, 75, generator=generator) < 0.5).index_fill(2, torch.tensor([7]), False)
    yield Sample(name="mask with an empty row", args=(*qkv(2, 2, 2, 50, 75, 32), empty_row.to(device)))
    added = torch.randn(50, 75, generator=generator).to(device, dtype)
    yield Sample(name="additive mask", args=(*qkv(2, 2, 2, 50, 75, 72), added, False))
    seed = torch.tensor([1234], device=device)
    yield Sample(name="dropout", args=(*qkv(1, 2, 2, 65, 65, 32), None, True, None, 0.25, seed, 3))
    far = (None, True, None, 0.0, None, 0, False)
    yield Sample(name="window", args=(*qkv(1, 4, 2, 90, 90, 32), *far, 20))
    yield Sample(name="cache, padding, window", args=(*qkv(2, 2, 1, 37, 61, 32), padding, *far[1:], 30, 24))
    yield Sample(name="before the keys", args=(*qkv(1, 2, 2, 40, 50, 16), *far, None, -5))
    yield Sample(name="capped", args=(*qkv(1, 2, 1, 45, 45, 32), *far, None, 0, 2.0))
    sinks = torch.randn(4, generator=generator).to(device, dtype).requires_grad_()
    yield Sample(name="sinks, window", args=(*qkv(2, 4, 2, 50, 50, 64), *far, 20, 0, None, sinks))
    bias = torch.randn(1, 2, 45, 60, generator=generator).to(device, dtype).requires_grad_()
    yield Sample(name="learned bias", args=(*qkv(2, 2, 2, 45, 60, 32), bias))
    yield Sample(name="empty batch", args=qkv(0, 2, 2, 5, 5, 16))
    yield Sample(name="GPT, T=256", args=(*qkv(8, 6, 6, 256, 256, 64), None, True), bench=True)
    yield Sample(name="Llama 1, T=1024", args=(*qkv(1, 8, 8, 1024, 1024, 128), None, True), bench=True)
    yield Sample(name="Llama, T=2048", args=(*qkv(1, 32, 8, 2048, 2048, 128), None, True), bench=True)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent=True)
