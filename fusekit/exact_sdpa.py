"""Attention of the float64 truth: torch's by its definition where its fused kernel's gradient is wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_SDPA = {F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default}
_MASK = 3  # its place among the arguments


class BySoftmax(TorchFunctionMode):
    """Within it, attention with an additive mask is products and a softmax.

    torch's CPU kernel (2.13) keeps of each row one number, largest score and log of the sum in one. Where the
    mask is finfo.min throughout, as of padding's rows, the log is rounded away, and gradients are wrong in
    any dtype. The scores are stored, heads times what the mask takes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SDPA:
            mask = kwargs.get("attn_mask", args[_MASK] if len(args) > _MASK else None)
            if isinstance(mask, Tensor) and mask.is_floating_point():
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)
