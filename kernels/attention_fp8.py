r"""Scaled dot-product attention whose forward products have FP8 operands.

    S = scale log2(e) Q(q) Q(k)^T,   base = ceil(rowmax S) - 8,   p = R(2^(S - base)),   P = p / rowsum p
    y = P Q(v)

Q rounds to e4m3 with a scale a head, or a scale for 128 tokens of it, and back; R rounds to e4m3 without a
scale: attention_fp8_format.py. Rows of P add up to one, as p is added up rounded: a row that attends evenly
gives the mean of its values, whichever way R went.

The gradient is that of this function, with what was rounded held apart by as much as it was:

    dq, dk, dv    pass Q unchanged, and are taken at Q(q), Q(k), Q(v)
    log p         passes R unchanged: R(E) = E exp(r), where r, the rounding in log space, is a constant

so that with P as above dS = P (dP - rowsum P dP), dP = dy Q(v)^T, dv = P^T dy, and rowsum P dP = dy y
exactly, as FlashAttention has it. With a P of its own, from the q and k that came or without R, a backward
pass would be that of no function: neither P nor dS would add up as they must, and a share of dP's mean, which
softmax takes out, would stay in dq and dk. (Of y eight more bits are kept: attention_tail.py.) The products
of the backward pass are 16-bit.

Saved for backward: codes, a byte an element, where q, k and v would be two; y, in 16 bits on a GPU a byte
more an element, and two float32 a row.
Shapes: q (B, H, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), any strides; H a multiple of Hkv; band and
documents as in attention_form.py. Shah et al. 2024, "FlashAttention-3", arXiv:2407.08608, section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import attention_fp8_cpu, attention_fp8_gpu, attention_tail
from fusekit.kernels.attention_form import Form, pairs
from fusekit.kernels.attention_fp8_cast import Codes, empty
from fusekit.kernels.attention_fp8_format import values_cpu
from fusekit.kernels.attention_fp8_reference import reference
from fusekit.kernels.attention_fp8_samples import samples
from fusekit.kernels.attention_fp8_supports import supports
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.op import Op


def _form(
    causal: bool, scale: float, window: int | None, offset: int, documents: Tensor | None,
    key_documents: Tensor | None,
) -> Form:  # fmt: skip
    return Form(
        None, causal, scale, 0.0, None, 0, False, window, offset, None, None, documents=documents,
        key_documents=key_documents,
    )  # fmt: skip


def _empty(x: Tensor, scaling: str, transposed: bool) -> Codes:
    """What is kept of an operand: codes on a GPU; on a CPU their values, which need no scales."""
    if on_gpu(x):
        return empty(x, scaling, transposed)
    return Codes(x.new_empty(x.shape), x.new_empty((0,), dtype=torch.float32))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, tail: int, *settings: Any) -> tuple[Tensor, ...]:
    B, H, Tq, _ = q.shape
    out = q.new_empty((B, Tq, H, v.shape[-1])).transpose(1, 2)
    stats = q.new_empty((2, B, H, Tq) if on_gpu(q) else (0,), dtype=torch.float32)
    held = (_empty(x, settings[-1], x is v) for x in (q, k, v))
    return out, stats, attention_tail.empty(q, v, tail), *(t for codes in held for t in codes)


def _forward(q: Tensor, k: Tensor, v: Tensor, tail: int, *settings: Any) -> tuple[Tensor, ...]:
    *rest, scaling = settings
    form = _form(*rest)
    if on_gpu(q):
        out, stats, cut, *held = attention_fp8_gpu.forward(q, k, v, form, scaling, tail=tail)
        return out, stats, cut, *(t for codes in held for t in codes)
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)
    nothing = [q.new_empty((0,), dtype=torch.float32) for _ in range(4)]
    q, k, v = (values_cpu(x, scaling) for x in (q, k, v))
    attention_fp8_cpu.forward(q, k, v, form, out)
    cut = attention_tail.empty(q, v, attention_tail.NONE)
    return out, nothing[0], cut, q, nothing[1], k, nothing[2], v, nothing[3]


def _backward_fake(
    grad_output: Tensor, q: Tensor, q_inverse: Tensor, k: Tensor, k_inverse: Tensor, v: Tensor,
    v_inverse: Tensor, out: Tensor, stats: Tensor, tail: Tensor, keys: int, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, Tq, DV = grad_output.shape
    sizes = ((Tq, H, q.shape[-1]), (keys, k.shape[1], q.shape[-1]), (keys, k.shape[1], DV))
    dq, dk, dv = (grad_output.new_empty((B, *size)).transpose(1, 2) for size in sizes)
    return dq, dk, dv


def _backward(
    grad_output: Tensor, q: Tensor, q_inverse: Tensor, k: Tensor, k_inverse: Tensor, v: Tensor,
    v_inverse: Tensor, out: Tensor, stats: Tensor, tail: Tensor, keys: int, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *rest, scaling = settings
    form = _form(*rest)
    if not on_gpu(grad_output):
        return attention_fp8_cpu.backward(grad_output, q, k, v, form)
    held = Codes(q, q_inverse), Codes(k, k_inverse), Codes(v, v_inverse)
    return attention_fp8_gpu.backward(
        grad_output, held, out, stats, tail, form, scaling, (grad_output.shape[2], keys)
    )


_SETTINGS = (
    "bool causal, float scale, int? window, SymInt offset, Tensor? documents, Tensor? key_documents, "
    "str scaling"
)
_forward_op = define(
    f"attention_fp8_forward(Tensor q, Tensor k, Tensor v, int tail, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "attention_fp8_backward(Tensor grad_output, Tensor q, Tensor q_inverse, Tensor k, Tensor k_inverse, "
    f"Tensor v, Tensor v_inverse, Tensor out, Tensor stats, Tensor tail, SymInt keys, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _AttentionFp8(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        causal, scale, window, offset, documents, key_documents, scaling = settings
        out, stats, tail, *held = _forward_op(q, k, v, attention_tail.GIVEN, *settings)
        ctx.save_for_backward(*held, out, stats, tail, documents, key_documents)
        ctx.settings, ctx.keys = (causal, scale, window, offset, scaling), k.shape[2]
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward("attention_fp8")
        *held, documents, key_documents = ctx.saved_tensors
        *band_, scaling = ctx.settings
        grads = _backward_op(grad_output, *held, ctx.keys, *band_, documents, key_documents, scaling)
        found = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *found, None, None, None, None, None, None, None


def _settings(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None,
    window: int | None = None, offset: int = 0, documents: Tensor | None = None,
    key_documents: Tensor | None = None, scaling: str = "head",
) -> tuple[Any, ...]:  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    settings = (causal, scale, window, offset, documents, key_documents, scaling)
    why_not = supports(q, k, v, *settings)
    if why_not is not None:
        raise ValueError(f"attention_fp8: {why_not}")
    return settings


def _run(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _forward_op(q, k, v, attention_tail.NONE, *_settings(q, k, v, *args, **kwargs))[0]


def _autograd(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _AttentionFp8.apply(q, k, v, *_settings(q, k, v, *args, **kwargs))


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)


fused = define(
    "attention_fp8(Tensor q, Tensor k, Tensor v, bool causal=False, float? scale=None, int? window=None, "
    "SymInt offset=0, Tensor? documents=None, Tensor? key_documents=None, str scaling='head') -> Tensor",
    _run,
    _fake,
    autograd=_autograd,
    autocast="lower",
)


def flops(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, *rest: Any) -> int:
    """Two matmuls; causal and a window spare the scores that nobody sees."""
    (B, H, Tq, D), Tk, DV = q.shape, k.shape[-2], v.shape[-1]
    window, offset = (rest[1] if len(rest) > 1 else None), (rest[2] if len(rest) > 2 else 0)
    return 2 * B * H * pairs(causal, window, offset, Tq, Tk) * (D + DV)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent=True)
