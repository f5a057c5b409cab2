"""Calls of the attention kernels in cpu/attention.cpp: bfloat16, no mask or a causal one, AVX512-BF16.

ATen's blocked kernel takes its 16-bit products through a library that is slow on such processors
(benchmarks/results/kernels_cpu.json has both). On a processor with AMX it has tiles of its own, and keeps
the work.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fusekit.kernels import cpu_library

MAX_FEATURES = 256


def takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether these kernels compute this attention, and are the fastest that do."""
    if q.dtype != torch.bfloat16 or mask is not None or dropout or not cpu_library.multiplies():
        return False
    features = (q.shape[-1], v.shape[-1])
    return (
        all(n % 2 == 0 and n <= MAX_FEATURES for n in features)
        and all(x.numel() > 0 and x.stride(-1) == 1 for x in (q, k, v))
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, out: Tensor, lse: Tensor) -> None:
    """Write out (B, H, Tq, Dv), features adjacent, and lse (B, H, Tq), each row's log sum exp."""
    tensors, sizes = (q, k, v, out), _sizes(q, k, v)
    cpu_library.call("attention_forward", *tensors, lse, _strides(*tensors), *sizes, int(causal), scale)


def backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, causal: bool, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write dq, dk, dv, each with its features adjacent."""
    dy = grad_output if grad_output.stride(-1) == 1 else grad_output.contiguous()
    strides = _strides(q, k, v, dy, dq, dk, dv)
    tensors = (q, k, v, dy, lse, dq, dk, dv)
    cpu_library.call("attention_backward", *tensors, strides, *_sizes(q, k, v), int(causal), scale)


def _strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    numbers = [stride for x in tensors for stride in x.stride()[:3]]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """batch, heads, key heads, queries, keys, features of q and k, features of v."""
    return *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
