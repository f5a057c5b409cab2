"""Arguments of `attention_fp8` that tests and benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusekit.kernels.op import Sample


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Both scalings of every form: lengths a few blocks long and no multiple of one, shared heads."""

    def heads(B: int, T: int, H: int, D: int) -> Tensor:  # what .view(B, T, H, D).transpose(1, 2) gives
        x = torch.randn(B, T, H, D, generator=generator, dtype=torch.float32)
        return x.to(device, dtype).transpose(1, 2).requires_grad_()

    def qkv(B: int, H: int, kv_heads: int, Tq: int, Tk: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
        return heads(B, Tq, H, D), heads(B, Tk, kv_heads, D), heads(B, Tk, kv_heads, D)

    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 20 + [1] * 95 + [2] * 25, [4] * 3 + [6] * 60 + [7] * 77], device=device)
    for scaling in ("head", "block"):
        ids = (None, None, scaling)
        yield Sample(name=f"plain, {scaling}", args=(*qkv(1, 2, 2, 70, 150, 64), False, None, None, 0, *ids))
        yield Sample(name=f"causal, {scaling}", args=(*qkv(1, 2, 1, 150, 150, 32), True, None, None, 0, *ids))
        yield Sample(name=f"window, {scaling}", args=(*qkv(1, 2, 2, 90, 140, 16), True, 0.3, 40, 50, *ids))
        packed = (*qkv(2, 2, 1, 140, 140, 32), True, None, None, 0, documents, None, scaling)
        yield Sample(name=f"documents, {scaling}", args=packed)
    yield Sample(name="80 features", args=(*qkv(1, 2, 2, 65, 65, 80), True))
    yield Sample(name="128 features", args=(*qkv(1, 2, 2, 65, 65, 128), True))
    empty_rows = (*qkv(1, 2, 2, 40, 50, 16), True, None, None, -5)
    yield Sample(name="rows without keys", args=empty_rows)
    yield Sample(name="empty batch", args=qkv(0, 2, 2, 5, 5, 16))
    yield Sample(name="GPT, T=1024", args=(*qkv(2, 12, 12, 1024, 1024, 64), True), bench=True)
    far = (True, None, None, 0, None, None)
    wide = (*qkv(1, 8, 4, 1024, 1024, 256), *far, "block")
    yield Sample(name="256 features, T=1024", args=wide, bench=True)
    numbers = (torch.arange(2048, device=device) // 300).view(1, 2048)
    packed = (*qkv(1, 8, 2, 2048, 2048, 128), True, None, None, 0, numbers, None, "block")
    yield Sample(name="Llama, packed documents", args=packed, bench=True)
    mistral = (*qkv(1, 8, 2, 4096, 4096, 128), True, None, 1024, 0, None, None, "block")
    yield Sample(name="Mistral, window of 1024", args=mistral, bench=True)
    for scaling in ("head", "block"):
        llama = (*qkv(1, 32, 8, 8192, 8192, 128), *far, scaling)
        yield Sample(name=f"Llama, T=8192, {scaling}", args=llama, bench=True)
