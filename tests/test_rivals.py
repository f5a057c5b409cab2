"""Other libraries' attention, called as the op's arguments mean it, or declined with a reason."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import cases
from benchmarks.kernels.rivals import RIVALS, Unfit
from fusekit.kernels.attention import OP

NAMES = ("flash-attn", "xformers", "cudnn-sdpa", "flash-sdpa")


def _flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What FlashAttention's documentation says of flash_attn_func, written out for (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    Tq, Tk = scores.shape[-2:]
    distance = torch.arange(Tk) - torch.arange(Tq)[:, None] - (Tk - Tq)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.view(-1, q.shape[1], 1, 1) * distance.abs()
    left, right = window_size
    keep = torch.ones(Tq, Tk, dtype=torch.bool)
    keep = keep & (distance >= -left) if left >= 0 else keep
    right = 0 if causal else right
    keep = keep & (distance <= right) if right >= 0 else keep
    p = scores.masked_fill(~keep, float("-inf")).softmax(-1).nan_to_num()
    return (p @ v).transpose(1, 2)


def _xformers() -> types.ModuleType:
    module = types.ModuleType("xformers.ops")

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        causal = attn_bias is not None
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)

    module.LowerTriangularMask = object  # type: ignore[attr-defined]
    module.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    return module


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = types.ModuleType("flash_attn")
    flash.flash_attn_func = _flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", _xformers())
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: contextlib.nullcontext())


@pytest.mark.parametrize("name", NAMES)
def test_computes_what_the_op_computes_or_declines(name: str) -> None:
    computed = set()
    for sample in OP.samples("cpu", torch.bfloat16):
        if sample.bench:
            continue
        try:
            result = RIVALS[name].functions["attention"](*sample.args)
        except Unfit as reason:
            assert str(reason)
            continue
        computed.add(sample.name)
        expected = OP.reference(*sample.args)
        torch.testing.assert_close(result.to(expected.dtype), expected, rtol=3e-2, atol=3e-2)
    assert "plain" in computed
    if name == "flash-attn":
        assert {"window", "ALiBi", "capped"} <= computed


def test_eager_computes_every_sample() -> None:
    for sample in OP.samples("cpu", torch.float32):
        if not sample.bench and sample.name != "dropout":
            result = cases.BASELINES["attention"](*sample.args)
            expected = OP.reference(*sample.args)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5, msg=sample.name)
