"""Normalisation of a residual sum: rows of add_layer_norm and add_rms_norm.

    h = x + residual;  y = norm(h)

h is an output of the op, because a pre-norm block reads it again. Every spelling has both rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.passes.pattern import Rule

SHAPES = {"x": "* N", "residual": "* N", "weight": "optional N", "bias": "optional N"}
GIVEN_SHAPES = {**SHAPES, "weight": "N", "bias": "N"}


def layer_norm(h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps)


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(h, h.shape[-1:], weight, eps)


def normalised(h: Tensor, eps: float) -> Tensor:
    """h / rms(h) in float32, as most models write it."""
    wide = h.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def llama(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Back to the input's dtype, then the weight: Llama, Mistral, Qwen."""
    return weight * normalised(h, eps).to(h.dtype)


def weight_in_float32(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The weight in float32, then back: OLMo-2, and the torchtitan and lit-gpt families."""
    return (weight.to(torch.float32) * normalised(h, eps)).to(h.dtype)


def t5(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The variance in float32 and the rest in the input's dtype, as T5 does in float32."""
    variance = h.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (h * torch.rsqrt(variance + eps)).to(h.dtype)


def gemma(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (normalised(h, eps) * (1.0 + weight.to(torch.float32))).to(h.dtype)


def divided(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h / sqrt(mean + eps), the paper's way."""
    wide = h.to(torch.float32)
    return weight * (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)


def weightless(h: Tensor, eps: float) -> Tensor:
    return normalised(h, eps).to(h.dtype)


def _summed(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """norm(x + residual), and the sum."""
    count = norm.__code__.co_argcount

    def with_bias(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, weight, bias, eps), h

    def with_weight(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, weight, eps), h

    def bare(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, eps), h

    variants: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {4: with_bias, 3: with_weight, 2: bare}
    return variants[count]


def _alone(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    count = norm.__code__.co_argcount
    if count == 4:
        return lambda x, weight, bias, eps: norm(x, weight, bias, eps)
    if count == 3:
        return lambda x, weight, eps: norm(x, weight, eps)
    return lambda x, eps: norm(x, eps)


def _both(op: str, norm: Callable[..., Tensor], source: str, offset: float | None = None) -> list[Rule]:
    """The row with the residual sum and the row without."""
    fixed = {} if offset is None else {"offset": offset}
    shapes = SHAPES if norm in (layer_norm, rms_norm) else GIVEN_SHAPES
    return [
        Rule(op, _summed(norm), f"residual + {source}", shapes, fixed),
        Rule(op, _alone(norm), source, shapes, {"residual": None, **fixed}),
    ]


RULES = [
    *_both("add_layer_norm", layer_norm, "torch.nn.LayerNorm"),
    *_both("add_rms_norm", rms_norm, "torch.nn.RMSNorm"),
    *_both("add_rms_norm", llama, "transformers LlamaRMSNorm"),
    *_both("add_rms_norm", t5, "transformers T5LayerNorm"),
    *_both("add_rms_norm", gemma, "transformers Gemma2RMSNorm", offset=1.0),
    *_both("add_rms_norm", weight_in_float32, "transformers Olmo2RMSNorm"),
    *_both("add_rms_norm", divided, "h / sqrt(mean(h * h) + eps)"),
    *_both("add_rms_norm", weightless, "RMSNorm without a weight"),
]
