"""optimize() on "cuda": a tiny GPT trains as eager does, through the Triton kernels.

Runs natively on a GPU, and from the compiled Triton IR in the sanitizer lane, where Dynamo needs torch.cuda's
stubs taken away first.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

import fusekit
from fusekit.gpt import GPT, GPTConfig
from fusekit.passes import price


@pytest.fixture(autouse=True)
def _dynamo_in_the_sanitizer() -> None:
    if "ttsem" in sys.modules:
        from ttsem._fakedriver import unstub_torch_cuda

        unstub_torch_cuda()


def _steps(model: nn.Module, tokens: Tensor, count: int) -> list[float]:
    # SGD: Adam would turn the rounding noise of a gradient that is zero by symmetry (the key bias) to steps.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    losses = []
    for _ in range(count):
        loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("precision", "tolerance"), [("keep", 1e-5), ("bf16", 2e-2), ("fp16", 4e-3)])
def test_a_tiny_gpt_trains_as_eager_does(precision: str, tolerance: float) -> None:
    torch.manual_seed(0)
    eager = GPT(GPTConfig(vocab=61, context=40, layers=1, width=32, heads=2)).to("cuda")
    fused = fusekit.optimize(copy.deepcopy(eager), precision=precision, remainder="eager")
    tokens = torch.randint(61, (2, 38), generator=torch.Generator().manual_seed(1)).to("cuda")

    plain, ours = _steps(eager, tokens, 2), _steps(fused, tokens, 2)

    ops = {f.op for f in fusekit.explain(fused).fused}
    assert ops == {"mlp", "add_layer_norm", "attention", "linear_cross_entropy"}, str(fusekit.explain(fused))
    for want, got in zip(plain, ours, strict=True):
        assert abs(got - want) <= tolerance * abs(want)
    for (name, want), got in zip(eager.named_parameters(), fused.parameters(), strict=True):
        assert (got - want).norm() <= 10 * tolerance * want.norm(), name


class Cached(nn.Module):
    """A decoding step: one query, keys that four heads share, and a mask of what is padding."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def test_a_growing_cache_meets_the_decoding_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price, "LEAST_GAIN", 0.0)  # so short a step pays only beside repeated keys
    torch.manual_seed(0)
    model = fusekit.optimize(Cached().eval(), remainder="eager")
    q = torch.randn(2, 1, 8, 16).to("cuda").transpose(1, 2)
    for length in range(140, 144):
        k, v = (torch.randn(2, 2, length, 16).to("cuda") for _ in range(2))
        mask = (torch.arange(length) >= torch.tensor([0, 70])[:, None])[:, None, None].to("cuda")
        torch.testing.assert_close(model(q, k, v, mask), Cached()(q, k, v, mask), rtol=1e-5, atol=1e-5)
    report = fusekit.explain(model)
    assert report.graphs == 2, str(report)
    running = {fusion.implementation for fusion in report.fused}
    assert running == {"own decoding kernel: few queries, their keys in parts"}, str(report)
