"""Shapes for curves over a size: the norms over their columns, attention over its tokens; and an FP8 layer as
it is within a step.

As many elements in each shape of a sweep, so that the work stays the same and only its form changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusekit.kernels.fp8_operand import fp8_operand
from fusekit.kernels.linear_fp8_cpu import WEIGHT
from fusekit.kernels.op import Sample
from fusekit.kernels.recipe import PRESETS

COLUMNS = (256, 1024, 4096, 8192)
ELEMENTS = {"cpu": 2 << 20, "cuda": 32 << 20}
TOKENS = (512, 1024, 4096, 8192)  # for GPUs
BATCH_TOKENS, HEADS, HEAD_SIZE = 16384, 16, 128


def columns(device: torch.device, dtype: torch.dtype, *, bias: bool) -> Iterator[Sample]:
    """x, residual (M, N), weight (N,), bias (N,) if there is one, eps."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    for N in COLUMNS:
        M = ELEMENTS[torch.device(device).type] // N
        parameters = [draw(N) for _ in range(1 + bias)]
        yield Sample(args=(draw(M, N), draw(M, N), *parameters, 1e-5), name=f"sweep {M}x{N}", bench=True)


def tokens(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """q, k, v (B, H, T, D), causal."""
    if torch.device(device).type != "cuda":
        return
    for T in TOKENS:
        shape = (BATCH_TOKENS // T, HEADS, T, HEAD_SIZE)
        qkv = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
        yield Sample(args=(*qkv, None, True), name=f"sweep T={T}", bench=True)


def kept_weight(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """The first linear of a GPT block, its weight quantised already: a step's second micro-batch."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(2048, 1024, generator=generator),
        torch.randn(4096, 1024, generator=generator) / 32,
    )
    x, weight = (t.to(device, dtype).requires_grad_() for t in (x, weight))
    recipe = PRESETS["fp8-tensorwise"].token()
    operand = list(fp8_operand(weight, recipe, WEIGHT, dtype, True, True, None, None))
    args = (x, weight, None, "none", recipe, None, None, None, operand)
    yield Sample(args=args, name="2048x1024x4096_weight-kept", bench=True)


SWEEPS: dict[str, Callable[[torch.device, torch.dtype], Iterator[Sample]]] = {
    "add_layer_norm": lambda device, dtype: columns(device, dtype, bias=True),
    "add_rms_norm": lambda device, dtype: columns(device, dtype, bias=False),
    "attention": tokens,
    "linear_fp8": kept_weight,
}
