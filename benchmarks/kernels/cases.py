"""Every op of the registry against what one would write in PyTorch, eager and compiled, both directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clock import Call
from fusekit.kernels import FP8_OPS, OPS
from fusekit.kernels.attention import reference as attention_reference
from fusekit.kernels.attention_form import dense
from fusekit.kernels.op import Op, Sample

MEASURED = OPS | FP8_OPS
CACHE_BYTES = 256 << 20  # copies of the arguments together exceed every level-2 cache in use (H200: 50 MB)
MOST_COPIES = 12


@dataclass(frozen=True)
class Case:
    name: str
    op: Op
    dtype: torch.dtype
    sample: Sample
    index: int


def copies(args: tuple[Any, ...], cache_bytes: int | None = None) -> list[tuple[Any, ...]]:
    """The arguments, and copies of them that together do not fit any cache: calls in turn find it cold."""
    size = sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))
    count = min(MOST_COPIES, max(2, math.ceil((cache_bytes or CACHE_BYTES) / max(size, 1))))
    return [args] + [tuple(_copy(a) for a in args) for _ in range(count - 1)]


def _copy(value: Any) -> Any:
    """The same values, strides and requires_grad in other memory."""
    if not isinstance(value, Tensor):
        return value
    with torch.no_grad():
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        if 0 in value.stride():  # an expanded mask stays expanded
            return value
        copy.copy_(value)
    return copy.requires_grad_(value.requires_grad)


# Ops that compute gradients in their forward pass: only the whole of both can be compared with eager's.
JOINT = frozenset({"linear_cross_entropy"})


def gradients_of(name: str) -> str:
    """What the direction of an op's gradients is called: "training" where the forward pass is in it."""
    return "training" if name in JOINT else "backward"


def forward_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> Call:
    """As in training: what backward needs is saved."""

    def call() -> Any:
        with torch.enable_grad():
            return fn(*args)

    return call


def evaluation_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return fn(*args)

    return call


def training_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> Call | None:
    """Forward and backward."""

    def call() -> Any:
        backward = backward_call(fn, args)
        return backward and backward()

    return call


def prepare(name: str, direction: str) -> Callable[..., Call | None]:
    """What makes the calls of an op's direction."""
    forward = evaluation_call if name in JOINT else forward_call
    return {"forward": forward, "backward": backward_call, "training": training_call}[direction]


def backward_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> Call | None:
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    returned = fn(*args)
    outputs = [
        t for t in (returned if isinstance(returned, tuple) else (returned,)) if t.requires_grad and t.numel()
    ]
    if not inputs or not outputs:
        return None
    grads = [torch.randn_like(t) for t in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True)


def _linear_act(x, weight, bias=None, residual=None, act="none", tf32=False):  # type: ignore[no-untyped-def]
    y = _ACTIVATIONS[act](F.linear(x, weight, bias))
    return y if residual is None else y + residual


def _add_layer_norm(x, residual, weight, bias, eps):  # type: ignore[no-untyped-def]
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], _like(weight, h), _like(bias, h), eps)
    return y, h.new_empty(0) if residual is None else h


def _add_rms_norm(x, residual, weight, eps, offset=0.0):  # type: ignore[no-untyped-def]
    h = x if residual is None else x + residual
    gain = None if weight is None else _like(weight, h) + offset if offset else _like(weight, h)
    return F.rms_norm(h, h.shape[-1:], gain, eps), h.new_empty(0) if residual is None else h


def _attention(
    q, k, v, mask=None, causal=False, scale=None, dropout=0.0, seed=None, seed_offset=0, tf32=False,
    window=None, offset=0, softcap=None, sinks=None, slopes=None, places=None, documents=None,
    key_documents=None, global_queries=None, global_keys=None, global_ahead=False,
):  # type: ignore[no-untyped-def] # fmt: skip
    if softcap is not None or sinks is not None:  # PyTorch has no such attention: written out
        return attention_reference(
            q, k, v, mask, causal, scale, dropout, seed, seed_offset, tf32, window, offset, softcap, sinks,
            slopes, places, documents, key_documents, global_queries, global_keys, global_ahead,
        )  # fmt: skip
    for more in (_alibi(q, k, slopes, places, offset), _same_document(documents, key_documents)):
        mask = _joined(mask, more)
    if window is not None or (causal and (offset or global_ahead or mask is not None)):
        flags = global_queries, global_keys, global_ahead
        keep = dense((q.shape[-2], k.shape[-2]), causal, window, offset, *flags, q.device)
        mask, causal = _joined(mask, keep), False
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, causal, scale=scale, **({"enable_gqa": True} if grouped else {})
    )


def _attention_fp8(
    q, k, v, causal=False, scale=None, window=None, offset=0, documents=None, key_documents=None, *_
):  # type: ignore[no-untyped-def] # fmt: skip
    """The attention without FP8: what FP8 has to be worth."""
    rows = {"documents": documents, "key_documents": key_documents}
    return _attention(q, k, v, None, causal, scale, window=window, offset=offset, **rows)


def _linear_fp8(x, weight, bias=None, act="none", *_):  # type: ignore[no-untyped-def]
    """The layer without FP8: what FP8 has to be worth."""
    return _linear_act(x, weight.to(x.dtype), _like(bias, x), None, act)


def _alibi(q: Tensor, k: Tensor, slopes: Tensor | None, places: Tensor | None, offset: int) -> Tensor | None:
    """ALiBi as a model adds it, in q's dtype."""
    if slopes is None:
        return None
    if places is None:
        queries, keys = (torch.arange(x.shape[-2], device=q.device) for x in (q, k))
        places = keys - queries[:, None] - offset
    else:
        places = places.unsqueeze(-2).unsqueeze(-2)
    return (slopes[..., None, None] * places).to(q.dtype)


def _same_document(documents: Tensor | None, key_documents: Tensor | None) -> Tensor | None:
    if documents is None:
        return None
    keys = documents if key_documents is None else key_documents
    return (documents[..., :, None] == keys[..., None, :]).view(-1, 1, documents.shape[-1], keys.shape[-1])


def _joined(mask: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Two masks as one, boolean or added."""
    if mask is None or more is None:
        return more if mask is None else mask
    if mask.dtype != torch.bool and more.dtype != torch.bool:
        return mask + more
    if mask.dtype == torch.bool and more.dtype == torch.bool:
        return mask & more
    added, keep = (more, mask) if mask.dtype == torch.bool else (mask, more)
    return torch.where(keep, added, -math.inf)


def _mlp(x, w1, b1, w2, b2, residual=None, act="gelu", tf32=False):  # type: ignore[no-untyped-def]
    return _linear_act(_linear_act(x, w1, b1, None, act), w2, b2, residual)


def _gated_act(gate, up=None, act="silu", up_first=False):  # type: ignore[no-untyped-def]
    if up is None:
        gate, up = gate.chunk(2, -1)
        gate, up = (up, gate) if up_first else (gate, up)
    return _ACTIVATIONS[act](gate) * up


def _gated_mlp(
    x, w_gate, w_up, w_down, b_gate=None, b_up=None, b_down=None, act="silu", up_first=False, tf32=False
):  # type: ignore[no-untyped-def]
    up = None if w_up is None else F.linear(x, w_up, b_up)
    return F.linear(_gated_act(F.linear(x, w_gate, b_gate), up, act, up_first), w_down, b_down)


def _qkv_linear(x, w_q, w_k, w_v, b_q=None, b_k=None, b_v=None, tf32=False):  # type: ignore[no-untyped-def]
    return F.linear(x, w_q, b_q), F.linear(x, w_k, b_k), F.linear(x, w_v, b_v)


def _rope(x, cos, sin, interleaved=False, rotary=None):  # type: ignore[no-untyped-def]
    """As transformers writes it; tables of one number a pair are repeated first."""
    rotary = cos.shape[-1] if rotary is None else rotary
    if cos.shape[-1] < rotary:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    part, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-part[..., rotary // 2 :], part[..., : rotary // 2]), -1)
    y = (part * cos + turned * sin).to(x.dtype)
    return torch.cat((y, rest), -1) if rest.shape[-1] else y


def _rms_norm_rope(x, weight, cos, sin, eps, offset=0.0, *layout):  # type: ignore[no-untyped-def]
    return _rope(_add_rms_norm(x, None, weight, eps, offset)[0], cos, sin, *layout)


def _like(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


def _linear_cross_entropy(x, weight, bias, targets, ignore_index=-100, reduction="mean", label_smoothing=0.0):  # type: ignore[no-untyped-def]
    logits = F.linear(x, weight, bias).float().reshape(-1, weight.shape[0])
    return F.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu_squared": lambda x: F.relu(x).square(),
}

# What a user would write; an op without a row is measured against its reference.
BASELINES: dict[str, Callable[..., Any]] = {
    "add_layer_norm": _add_layer_norm,
    "add_rms_norm": _add_rms_norm,
    "attention": _attention,
    "attention_fp8": _attention_fp8,
    "gated_act": _gated_act,
    "gated_mlp": _gated_mlp,
    "linear_act": _linear_act,
    "linear_fp8": _linear_fp8,
    "mlp": _mlp,
    "qkv_linear": _qkv_linear,
    "rms_norm_rope": _rms_norm_rope,
    "rope": _rope,
    "linear_cross_entropy": _linear_cross_entropy,
}
