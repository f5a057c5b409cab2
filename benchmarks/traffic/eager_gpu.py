"""Eager PyTorch as it runs on a GPU, for fake tensors on the CPU: its autocast, and its own fused RMSNorm.

Both autocasts lower the same matrix products, convolutions and attention; a GPU's also widens what is named
in FLOAT32. F.rms_norm is one kernel on a GPU, and a chain of small ones on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

LIBRARY = torch.library.Library("fusekit_traffic", "DEF")
LIBRARY.define("rms_norm(Tensor x, Tensor? weight) -> (Tensor, Tensor)")
LIBRARY.define("rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor? weight) -> (Tensor, Tensor)")


@torch.library.register_fake("fusekit_traffic::rms_norm", lib=LIBRARY)
def _rms_norm(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("fusekit_traffic::rms_norm_backward", lib=LIBRARY)
def _rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if weight is None else torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        y, rstd = torch.ops.fusekit_traffic.rms_norm(x, weight)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dweight = torch.ops.fusekit_traffic.rms_norm_backward(dy, *ctx.saved_tensors)
        return dx, dweight if ctx.needs_input_grad[1] else None


@contextlib.contextmanager
def gpu_norms() -> Iterator[None]:
    """F.rms_norm is the kernel that a GPU has for it."""
    with mock.patch.object(F, "rms_norm", lambda x, shape, weight=None, eps=None: _RMSNorm.apply(x, weight)):
        yield


# Of "CUDA Ops that can autocast to float32", https://docs.pytorch.org/docs/stable/amp.html, those that the
# models counted here may call; a softmax and a sum take their dtype argument there, with the same effect.
FLOAT32 = {
    *("layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "softplus", "norm"),
    *("cross_entropy_loss", "nll_loss", "nll_loss_nd", "binary_cross_entropy_with_logits", "mse_loss"),
    *("pow", "rsqrt", "exp", "log", "reciprocal", "cumsum", "prod", "sum"),
}


class _Widen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


@contextlib.contextmanager
def gpu_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Eager autocast to `dtype`, on CPU tensors that stand for a GPU's."""
    with gpu_norms(), _Widen(), torch.autocast("cpu", dtype):
        yield
