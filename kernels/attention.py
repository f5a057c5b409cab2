r"""Scaled dot-product attention that never stores the scores.

    S = cap(scale q k^T) + slope distance + mask,   P = softmax(S) over the keys,   y = dropout(P) v
    dv = dropout(P)^T dy,   dP = dropout'(dy v^T),   delta = rowsum(dy * y),   dS = P (dP - delta)
    dq = scale cap' dS k,   dk = scale cap' dS^T q,   dmask = dS summed over what the mask repeats

cap(s) = softcap tanh(s / softcap), or s. A sink is one logit more a head in the softmax's sum, without a
value: P no longer adds up to one, and dsink = - sum over rows of P_sink rowsum(P dP). That sum cancels in
part, and delta would show in it that y was rounded. Which keys a query sees by its place (causal, window,
offset), as a global token or by its document, and ALiBi's slope and distance, stand in attention_form.py.

Dao 2023, "FlashAttention-2", arXiv:2307.08691; query heads share keys as in Ainslie et al. 2023, "GQA",
arXiv:2305.13245; capped scores: Gemma 2, arXiv:2408.00118; sinks: Xiao et al. 2023, arXiv:2309.17453; ALiBi:
Press et al. 2021, arXiv:2108.12409; windows beside global tokens: Beltagy et al. 2020, "Longformer",
arXiv:2004.05150.
Saved for backward: q, k, v, y, of our own kernels in 16 bits a byte more an element of y (attention_tail.py),
and one or two float32 a row; S and P are computed again.
A row that a boolean mask (or -inf) or the band leaves no key has y = 0 and no gradient, as in torch's own
attention; a row of finfo.min in an additive mask is shared out evenly, as softmax does.
Dropout draws number ((b H + h) Tq + i) Tk + j of Philox for element (b, h, i, j), forward and backward.
Shapes: q (B, H, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), any strides; H a multiple of Hkv.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import (
    attention_blocked,
    attention_choice,
    attention_gradient,
    attention_native,
    attention_tail,
    philox,
)
from fusekit.kernels.attention_form import TENSORS, Form, dense, pairs, rows_of
from fusekit.kernels.attention_samples import samples
from fusekit.kernels.attention_supports import supports
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.op import Op
from fusekit.kernels.tape import NEVER, PATIENT
from fusekit.kernels.times_file import OWN


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
    slopes: Tensor | None = None,
    places: Tensor | None = None,
    documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    global_queries: Tensor | None = None,
    global_keys: Tensor | None = None,
    global_ahead: bool = False,
    deterministic: bool = True,
) -> Tensor:
    """The definition, scores and all. P is rounded to q.dtype where it meets v, as a matmul needs it."""
    precise = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.to(precise) @ k.to(precise).transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        places = _distances(scores, offset) if places is None else places.unsqueeze(-2).unsqueeze(-2)
        scores = scores + slopes.to(precise)[..., None, None] * places.to(precise)
    if causal or window is not None:
        flags = global_queries, global_keys, global_ahead
        seen = dense((q.shape[-2], k.shape[-2]), causal, window, offset, *flags, q.device)
        scores = scores.masked_fill(~seen, -math.inf)
    if documents is not None:
        same = rows_of(documents)[:, :, None] == rows_of(_or(key_documents, documents))[:, None, :]
        scores = scores.masked_fill(~same[:, None], -math.inf)
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


def _distances(scores: Tensor, offset: int) -> Tensor:
    """Key place - query place of each score, (Tq, Tk)."""
    queries, keys = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
    return keys - queries[:, None] - offset


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _drawn(seed: Tensor | None) -> Tensor:
    if seed is None:
        raise ValueError("attention: dropout needs a seed, one int64 element on the device of q")
    return seed


def _forward(q: Tensor, k: Tensor, v: Tensor, tail: int, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    form = Form(*settings)
    if on_gpu(q):
        attention_gradient.prepare(q, k, v, form)
        return attention_choice.forward(q, k, v, form, tail)
    found = (
        attention_native.forward(q, k, v, *_native(form))
        if form.is_plain
        else attention_blocked.forward(q, k, v, form)
    )
    return *found, attention_tail.empty(q, v, tail)


def _native(form: Form) -> tuple[Any, ...]:
    return form.mask, form.causal, form.scale, form.dropout, form.seed, form.seed_offset


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, tail: int, mask: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Tq, _ = q.shape
    out = q.new_empty((B, Tq, H, v.shape[-1])).transpose(1, 2)
    two = mask is not None and mask.dtype != torch.bool
    stats = q.new_empty((1 + two, B, H, Tq), dtype=torch.float32)
    return out, stats, attention_tail.empty(q, v, tail)


def _backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, tail: Tensor,
    bias_grad: bool, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    form = Form(*settings)
    grads: tuple[Tensor | None, ...]
    if on_gpu(q):
        grads = attention_gradient.backward(grad_output, q, k, v, out, stats, tail, form, bias_grad)
    elif bias_grad or not form.is_plain:
        grads = attention_blocked.backward(grad_output, q, k, v, out, stats, form, bias_grad)
    else:
        grads = *attention_native.backward(grad_output, q, k, v, out, stats, *_native(form)), None, None
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, tail: Tensor,
    bias_grad: bool, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    form = Form(*settings)
    grads = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    dmask = form.mask.new_empty(form.mask.shape) if bias_grad and form.mask is not None else q.new_empty(0)
    dsinks = q.new_empty(0) if form.sinks is None else form.sinks.new_empty(form.sinks.shape)
    return *grads, dmask, dsinks


_SETTINGS = (
    "Tensor? mask, bool causal, float scale, float dropout, Tensor? seed, int seed_offset, bool tf32, "
    "int? window, SymInt offset, float? softcap, Tensor? sinks, Tensor? slopes, Tensor? places, "
    "Tensor? documents, Tensor? key_documents, Tensor? global_queries, Tensor? global_keys, "
    "bool global_ahead, bool deterministic"
)


def _check(q: Tensor, k: Tensor, v: Tensor, tail: int, *settings: Any) -> None:
    why_not = supports(q, k, v, *settings)
    if why_not is not None:
        raise ValueError(f"attention: {why_not}")


def _depends(q: Tensor, k: Tensor, v: Tensor, tail: int, *settings: Any) -> Any:
    """Who computes, and whether what has no gradient is asked for one."""
    slopes = settings[_SLOPES]
    return attention_choice.state(), slopes is not None and slopes.requires_grad


def _backward_depends(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, tail: Tensor,
    bias_grad: bool, *settings: Any,
) -> Any:  # fmt: skip
    return attention_choice.state() if _repeats(q, k, v, *settings) else NEVER


def _repeats(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> bool:
    """Whether the backward pass has the same bits each time: it is our own."""
    if settings[_DETERMINISTIC] or not on_gpu(q):
        return True
    return attention_gradient.choose(q, k, v, Form(*settings)).name == OWN


_forward_op = define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, int tail, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    check=_check,
    depends=_depends,
    patience=PATIENT,
)
_backward_op = define(
    "attention_backward(Tensor grad_output, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, "
    f"Tensor tail, bool bias_grad, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    depends=_backward_depends,
)


_SINKS = 3 + Form._fields.index("sinks")
_SLOPES = Form._fields.index("slopes")
_DETERMINISTIC = Form._fields.index("deterministic")
_TENSORS = tuple(Form._fields.index(name) for name in TENSORS)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        made = _forward_op(q, k, v, attention_tail.wanted(q), *settings)
        ctx.save_for_backward(q, k, v, *made, *(settings[place] for place in _TENSORS))
        kept = [None if isinstance(value, Tensor) else value for value in settings]
        # What decides now, as torch.nn.attention.sdpa_kernel around the forward pass, decides of both.
        kept[_DETERMINISTIC] = _repeats(q, k, v, *settings)
        ctx.settings = tuple(kept)
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward("attention")
        q, k, v, out, stats, tail, *tensors = ctx.saved_tensors
        settings = list(ctx.settings)
        for place, tensor in zip(_TENSORS, tensors, strict=True):
            settings[place] = tensor
        needed = ctx.needs_input_grad
        grads = _backward_op(grad_output, q, k, v, out, stats, tail, needed[3], *settings)
        wanted: list[Tensor | None] = [None] * (3 + len(settings))
        for place, grad in zip((0, 1, 2, 3, _SINKS), grads, strict=True):
            wanted[place] = grad if needed[place] else None
        return tuple(wanted)


def _settings(
    q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None = None, causal: bool = False, scale: float | None = None, dropout: float = 0.0,
    seed: Tensor | None = None, seed_offset: int = 0, tf32: bool = False,
    window: int | None = None, offset: int = 0, softcap: float | None = None, sinks: Tensor | None = None,
    slopes: Tensor | None = None, places: Tensor | None = None, documents: Tensor | None = None,
    key_documents: Tensor | None = None, global_queries: Tensor | None = None,
    global_keys: Tensor | None = None, global_ahead: bool = False, deterministic: bool = True,
) -> Form:  # fmt: skip
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.ndim and q.shape[-1] else 1.0  # else refused
    return Form(
        mask, causal, scale, dropout, seed, seed_offset, tf32, window, offset, softcap, sinks, slopes, places,
        documents, key_documents, global_queries, global_keys, global_ahead, deterministic,
    )  # fmt: skip


def _checked(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Form:
    form = _settings(q, k, v, *args, **kwargs)
    _check(q, k, v, attention_tail.NONE, *form)
    return form


def _run(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _forward_op(q, k, v, attention_tail.NONE, *_settings(q, k, v, *args, **kwargs))[0]


def _autograd(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Attention.apply(q, k, v, *_settings(q, k, v, *args, **kwargs))


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _forward_fake(q, k, v, attention_tail.NONE, None)[0]


fused = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, bool causal=False, float? scale=None, "
    "float dropout=0.0, Tensor? seed=None, int seed_offset=0, bool tf32=False, int? window=None, "
    "SymInt offset=0, float? softcap=None, Tensor? sinks=None, Tensor? slopes=None, Tensor? places=None, "
    "Tensor? documents=None, Tensor? key_documents=None, Tensor? global_queries=None, "
    "Tensor? global_keys=None, bool global_ahead=False, bool deterministic=True) -> Tensor",
    _run,
    _fake,
    autograd=_autograd,
    autocast="lower",
    autocast_keeps=("slopes", "places"),
)


def flops(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, *rest: Any
) -> int:
    """Two matmuls; causal and a window spare the scores that nobody sees. What documents spare and global
    tokens add is data."""
    (B, H, Tq, D), Tk, DV = q.shape, k.shape[-2], v.shape[-1]
    window, offset = (rest[5] if len(rest) > 5 else None), (rest[6] if len(rest) > 6 else 0)
    return 2 * B * H * pairs(causal, window, offset, Tq, Tk) * (D + DV)


def runs_on(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> str:
    """Who computes this call and why, as "own kernel: window"; of tensors no values are looked at."""
    return attention_gradient.describe(q, k, v, _checked(q, k, v, *args, **kwargs))


def measure(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, clock: Any = None, **kwargs: Any
) -> dict[str, float]:
    """Seconds of whoever may compute this call on its GPU, kept for later calls; empty without a choice."""
    if not on_gpu(q):
        return {}
    call = q, k, v, _checked(q, k, v, *args, **kwargs), clock
    return attention_choice.measure(*call) | attention_gradient.measure(*call)


def retreat(reason: str, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> str:
    """Have no library compute calls of this kind any more, in this process; reason is what one did wrong.

    Returns the name of who computed this call until now; "" where our own kernels did."""
    return attention_gradient.retreat(q, k, v, _checked(q, k, v, *args, **kwargs), reason)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent=True)
