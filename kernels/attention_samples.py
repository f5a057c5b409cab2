"""Arguments of `attention` that tests and benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusekit.kernels.op import Sample


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Lengths a few blocks long and no multiple of one, every kind of mask, shared heads, odd features."""

    def heads(B: int, T: int, H: int, D: int) -> Tensor:  # what .view(B, T, H, D).transpose(1, 2) gives
        x = torch.randn(B, T, H, D, generator=generator, dtype=torch.float32)
        return x.to(device, dtype).transpose(1, 2).requires_grad_()

    def qkv(B: int, H: int, kv_heads: int, Tq: int, Tk: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
        return heads(B, Tq, H, D), heads(B, Tk, kv_heads, D), heads(B, Tk, kv_heads, D)

    generator = torch.Generator().manual_seed(0)
    yield Sample(name="plain", args=qkv(1, 2, 2, 70, 70, 64))
    yield Sample(name="causal", args=(*qkv(2, 2, 2, 133, 133, 40), None, True))
    yield Sample(name="causal, grouped, longer keys", args=(*qkv(1, 4, 2, 37, 90, 16), None, True, 0.3))
    lengths = torch.tensor([61, 30]).view(2, 1, 1, 1)
    padding = (torch.arange(61) < lengths).to(device)
    yield Sample(name="padding mask", args=(*qkv(2, 2, 1, 61, 61, 32), padding))
    empty_row = (torch.rand(1, 2, 50, 75, generator=generator) < 0.5).index_fill(2, torch.tensor([7]), False)
    yield Sample(name="mask with an empty row", args=(*qkv(2, 2, 2, 50, 75, 32), empty_row.to(device)))
    added = torch.randn(50, 75, generator=generator).to(device, dtype)
    yield Sample(name="additive mask", args=(*qkv(2, 2, 2, 50, 75, 72), added, False))
    seed = torch.tensor([1234], device=device)
    yield Sample(name="dropout", args=(*qkv(1, 2, 2, 65, 65, 32), None, True, None, 0.25, seed, 3))
    far = (None, True, None, 0.0, None, 0, False)
    yield Sample(name="window", args=(*qkv(1, 4, 2, 90, 90, 32), *far, 20))
    yield Sample(name="cache, padding, window", args=(*qkv(2, 2, 1, 37, 61, 32), padding, *far[1:], 30, 24))
    yield Sample(name="before the keys", args=(*qkv(1, 2, 2, 40, 50, 16), *far, None, -5))
    yield Sample(name="capped", args=(*qkv(1, 2, 1, 45, 45, 32), *far, None, 0, 2.0))
    sinks = torch.randn(4, generator=generator).to(device, dtype).requires_grad_()
    yield Sample(name="sinks, window", args=(*qkv(2, 4, 2, 50, 50, 64), *far, 20, 0, None, sinks))
    bias = torch.randn(1, 2, 45, 60, generator=generator).to(device, dtype).requires_grad_()
    yield Sample(name="learned bias", args=(*qkv(2, 2, 2, 45, 60, 32), bias))
    slopes = 2.0 ** -torch.arange(1.0, 5.0).to(device)
    plain = (*far, None, 0, None, None)
    yield Sample(name="ALiBi", args=(*qkv(2, 4, 2, 80, 80, 32), *plain, slopes))
    places = (torch.arange(61) < lengths[:, 0, 0]).long().cumsum(-1).to(device)
    cached = (padding, *far[1:], None, 0, None, None)
    yield Sample(
        name="ALiBi, padded",
        args=(*qkv(2, 4, 4, 61, 61, 32), *cached, slopes.view(1, 4).expand(2, 4), places),
    )
    documents = torch.tensor([[0] * 20 + [1] * 45 + [2] * 15, [4] * 3 + [6] * 30 + [7] * 47], device=device)
    yield Sample(name="documents", args=(*qkv(2, 4, 2, 80, 80, 32), *plain, None, None, documents))
    scattered = torch.randint(0, 4, (2, 90), generator=generator).to(device)
    given = (*qkv(1, 2, 2, 80, 90, 32), None, False, *far[2:], 40, 10, None, None, None, None)
    yield Sample(name="documents in no order", args=(*given, scattered[0, :80].int(), scattered[1:]))
    near = (*far, 25, 12, None, None, None, None)
    flags = torch.zeros(2, 90, dtype=torch.bool)
    flags[0, 0] = flags[1, 60:63] = True
    everywhere = (None, None, flags.to(device), flags.to(device), True)
    yield Sample(name="local and global", args=(*qkv(2, 4, 2, 90, 90, 32), *near, *everywhere))
    first = (torch.arange(75) < 2).to(device)
    ahead = (*far, 20, 15, None, None, None, None, None, None, None, first)
    yield Sample(name="window and first keys", args=(*qkv(1, 2, 2, 60, 75, 32), *ahead))
    for D in (96, 80):
        yield Sample(name=f"{D} features", args=(*qkv(1, 2, 2, 65, 65, D), None, True))
    yield Sample(name="empty batch", args=qkv(0, 2, 2, 5, 5, 16))
    yield Sample(name="GPT, T=256", args=(*qkv(8, 6, 6, 256, 256, 64), None, True), bench=True)
    yield Sample(name="Llama 1, T=1024", args=(*qkv(1, 8, 8, 1024, 1024, 128), None, True), bench=True)
    yield Sample(name="Llama, T=2048", args=(*qkv(1, 32, 8, 2048, 2048, 128), None, True), bench=True)
    yield Sample(name="Phi-2, T=1024", args=(*qkv(1, 8, 8, 1024, 1024, 80), None, True), bench=True)
    mistral = (*qkv(1, 8, 2, 2048, 2048, 128), *far, 512)
    yield Sample(name="Mistral, window of 512", args=mistral, bench=True)
    gemma = (*qkv(1, 8, 4, 1024, 1024, 256), *far, None, 0, 50.0)
    yield Sample(name="Gemma 2, capped", args=gemma, bench=True)
    bias = torch.randn(1, 12, 512, 512, generator=generator).to(device, dtype).requires_grad_()
    yield Sample(name="T5, learned bias", args=(*qkv(2, 12, 12, 512, 512, 64), bias), bench=True)
    sinks = torch.randn(16, generator=generator).to(device, dtype).requires_grad_()
    gpt_oss = (*qkv(1, 16, 2, 1024, 1024, 64), *far, 128, 0, None, sinks)
    yield Sample(name="GPT-OSS, sinks, window of 128", args=gpt_oss, bench=True)
    slopes = 2.0 ** -torch.arange(1.0, 9.0).to(device)
    mpt = (*qkv(1, 8, 8, 1024, 1024, 128), *plain, slopes)
    yield Sample(name="MPT, ALiBi", args=mpt, bench=True)
    documents = (torch.arange(2048, device=device) // 300).view(1, 2048)
    packed = (*qkv(1, 8, 2, 2048, 2048, 128), *plain, None, None, documents)
    yield Sample(name="Llama, packed documents", args=packed, bench=True)
    flags = (torch.arange(2048, device=device) % 1024 < 4).view(1, 2048)
    longformer = (*far, 513, 256, None, None, None, None, None, None)
    args = (*qkv(1, 12, 12, 2048, 2048, 64), *longformer, flags, flags, True)
    yield Sample(name="Longformer, window of 513, global tokens", args=args, bench=True)
    modern_bert = (*qkv(1, 12, 12, 2048, 2048, 64), *far, 129, 64)
    yield Sample(name="ModernBERT, window of 129", args=modern_bert, bench=True)
