"""What an op is to the rest of fusekit: a data sheet, and samples that tests and benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *LOW_PRECISION)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Arguments for one call of an op; floating tensors that require a gradient are differentiated."""

    args: tuple[Any, ...]
    name: str = ""
    bench: bool = False


@dataclass(frozen=True, kw_only=True)
class Op:
    """A fused op.

    fused: the differentiable op under torch.ops.fusekit.
    reference: the same function in plain PyTorch, any floating dtype; it defines the result.
    samples: samples(device, dtype) yields Sample; small ones for tests, bench=True ones for benchmarks.
    supports: supports(*args) returns None, or why not, as a sentence; it never looks at data.
    flops: flops(*args) returns the forward pass's floating point operations.
    inherent: a low-precision intermediate is part of the method (P in attention), so parity allows 2.5
        floors; "grad" where that is true of the gradients only.
    """

    fused: Any
    reference: Callable[..., Any]
    samples: Callable[[torch.device | str, torch.dtype], Iterable[Sample]]
    supports: Callable[..., str | None]
    flops: Callable[..., int]
    inherent: bool | str = False


def not_runnable(*tensors: Tensor | None) -> str | None:
    """Why these tensors cannot meet in one kernel: device, dtype or layout."""
    present = [t for t in tensors if t is not None]
    first = present[0]
    for t in present:
        if t.device != first.device:
            return f"tensors are on different devices: {first.device} and {t.device}"
        if t.layout != torch.strided:
            return f"layout {t.layout} is not strided"
        if t.dtype not in DTYPES:
            return f"dtype {str(t.dtype).removeprefix('torch.')} is none of float32, float16, bfloat16"
    return None
