"""A processor that multiplies 16-bit numbers, for tests of its paths on one that does not."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fusekit.kernels import linear_cpu
from fusekit.kernels.linear_cpu import add_in_epilogue, apply_with_epilogue


def multiply_low_precision(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Have linear_cpu and `modules` take 16-bit products for the processor's own.

    Those that oneDNN refuses, as all where the processor has none (AVX2), are float32's, rounded once."""
    for module in (linear_cpu, *modules):
        monkeypatch.setattr(module, "multiplies", lambda dtype: True)
    monkeypatch.setattr(linear_cpu, "apply_with_epilogue", _apply)
    monkeypatch.setattr(linear_cpu, "add_in_epilogue", _add)


@functools.cache
def _refused(dtype: torch.dtype) -> bool:
    x = torch.ones(16, 16, dtype=dtype)
    try:
        apply_with_epilogue(x, x, None, "none")
    except RuntimeError:
        return True
    return False


def _wide(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.float() for x in tensors)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    given = _wide(x, weight, bias) if _refused(x.dtype) else (x, weight, bias)
    return apply_with_epilogue(*given, act).to(x.dtype)


def _add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    given = x, weight, bias, residual
    return add_in_epilogue(*(_wide(*given) if _refused(x.dtype) else given)).to(x.dtype)
