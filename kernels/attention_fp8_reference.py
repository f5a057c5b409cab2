"""`attention_fp8` in plain PyTorch, scores and all, with its gradient: what its kernels are held to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.attention_form import dense, rows_of
from fusekit.kernels.attention_fp8_format import HEADROOM, round_p, values
from fusekit.kernels.attention_tiles import LOG2E


class _Straight(torch.autograd.Function):
    """The value of `rounded`, the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _StraightInLog(torch.autograd.Function):
    """R(E), whose logarithm has the gradient of E's."""

    @staticmethod
    def forward(ctx: Any, e: Tensor) -> Tensor:
        p = round_p(e)
        ctx.save_for_backward(e, p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        e, p = ctx.saved_tensors
        return grads[0] * torch.where(e > 0.0, p / e, 0.0)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    offset: int = 0,
    documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    scaling: str = "head",
) -> Tensor:
    """The definition, scores and all; products in at least float32, one rounding."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    behind = (_Straight.apply(x.to(precise), values(x, scaling)) for x in (q, k, v))
    q8, k8, v8 = (x if i == 0 else x.repeat_interleave(group, 1) for i, x in enumerate(behind))
    scores = q8 @ k8.transpose(-1, -2) * (scale * LOG2E)
    if causal or window is not None:
        seen = dense((q.shape[-2], k.shape[-2]), causal, window, offset, None, None, False, q.device)
        scores = scores.masked_fill(~seen, -math.inf)
    if documents is not None:
        keys = documents if key_documents is None else key_documents
        same = rows_of(documents)[:, :, None] == rows_of(keys)[:, None, :]
        scores = scores.masked_fill(~same[:, None], -math.inf)
    if not scores.shape[-1]:
        return q8.new_zeros((*q.shape[:-1], v.shape[-1])).to(q.dtype)
    empty_rows = (scores == -math.inf).all(-1, keepdim=True)
    base = scores.detach().masked_fill(empty_rows, 0.0).amax(-1, keepdim=True).ceil() - HEADROOM
    p = _StraightInLog.apply(torch.exp2(scores - base))
    p = p / p.sum(-1, keepdim=True).masked_fill(empty_rows, 1.0)
    return (p @ v8).to(q.dtype)
