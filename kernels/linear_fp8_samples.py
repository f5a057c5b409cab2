"""Arguments of linear_fp8 that tests and benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fusekit.kernels.op import Sample
from fusekit.kernels.recipe import PRESETS


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Small: every preset, activations, layouts. bench: the first linear of a GPT block, every preset."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    for name in PRESETS:
        bias = make(144) if name != "mxfp8" else None
        yield Sample(args=(make(2, 35, 160), make(144, 160, scale=0.08), bias, "none", name), name=name)
    delayed = replace(PRESETS["fp8-tensorwise"], delayed=True, grad_weight=False).token()
    state = torch.tensor([64.0, 512.0, 1024.0], device=device), torch.zeros(3, device=device)
    few = make(70, 64), make(48, 64, scale=0.12)
    yield Sample(args=(*few, None, "none", delayed, *state), name="delayed")
    yield Sample(args=(make(70, 64), make(48, 64, scale=0.12), make(48), "gelu"), name="gelu")
    yield Sample(args=(make(0, 5, 32), make(16, 32), None, "silu"), name="empty_batch")
    x, weight = make(35, 2, 48), make(48, 80, scale=0.15)
    strided, transposed = (t.detach().transpose(0, 1).requires_grad_() for t in (x, weight))
    yield Sample(args=(strided, transposed, None, "none", "fp8-block"), name="strided_conv1d")
    yield Sample(args=(make(32), make(16, 32), make(16)), name="vector")
    variants = {name: recipe.token() for name, recipe in PRESETS.items() if not recipe.delayed}
    for accumulation in ("fast", "fp32"):
        variants[accumulation] = replace(PRESETS["fp8-tensorwise"], accumulation=accumulation).token()
    for name, token in variants.items():
        args = (make(2048, 1024), make(4096, 1024, scale=1 / 32), None, "none", token)
        yield Sample(args=args, name=f"2048x1024x4096_{name}", bench=True)
    delayed = replace(PRESETS["fp8-tensorwise"], delayed=True).token()
    many = make(2048, 1024), make(4096, 1024, scale=1 / 32), make(4096)
    yield Sample(args=(*many, "gelu_tanh", delayed, *state), name="2048x1024x4096_delayed", bench=True)
