"""Shapes for curves over a size: the norms over their columns, attention over its tokens.

As many elements in each shape of a sweep, so that the work stays the same and only its form changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusekit.kernels.op import Sample

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


SWEEPS: dict[str, Callable[[torch.device, torch.dtype], Iterator[Sample]]] = {
    "add_layer_norm": lambda device, dtype: columns(device, dtype, bias=True),
    "add_rms_norm": lambda device, dtype: columns(device, dtype, bias=False),
    "attention": tokens,
}
