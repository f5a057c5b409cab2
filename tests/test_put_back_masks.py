"""Attention whose mask a rule took apart, put back as too small: it must be the model's again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusekit
from fusekit.passes import price

LOWEST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.usefixtures("checked")


class Attend(nn.Module):
    """One attention written out; `weigh` makes weights of scores, tokens and the module."""

    def __init__(self, weigh: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed, self.qkv, self.weigh = nn.Embedding(9, 16), nn.Linear(16, 48), weigh
        self.bias = nn.Parameter(torch.randn(2, 12, 12))

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(self.embed(ids)).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * 0.3
        return self.weigh(self, scores, ids) @ v


def causal() -> Tensor:
    return torch.ones(12, 12, dtype=torch.bool).tril()


def padding(self: Attend, scores: Tensor, ids: Tensor) -> Tensor:
    return torch.softmax(scores.masked_fill(~(ids > 0)[:, None, None], LOWEST), -1)


def padding_and_causal(self: Attend, scores: Tensor, ids: Tensor) -> Tensor:
    seen = causal() & (ids > 0)[:, None, None]
    return torch.softmax(scores.masked_fill(~seen, LOWEST), -1)


def bias_and_window(self: Attend, scores: Tensor, ids: Tensor) -> Tensor:
    seen = causal() & ~causal().tril(-4)
    return torch.softmax((scores + self.bias).masked_fill(~seen, LOWEST), -1)


def written_after(self: Attend, scores: Tensor, ids: Tensor) -> Tensor:
    """What the mask was made of is overwritten before the scores are masked."""
    flags = ids * 1
    mask = (flags[:, None, None] == 0).float() * -1e9
    flags.masked_fill_(flags == 0, 1)
    return torch.softmax((scores + self.bias) + mask, -1)


def two_biases(self: Attend, scores: Tensor, ids: Tensor) -> Tensor:
    return torch.softmax((scores + self.bias) + (ids[:, None, None] == 0).float() * -1e9, -1)


WAYS = (padding, padding_and_causal, bias_and_window, written_after, two_biases)


def results(model: nn.Module, ids: Tensor, training: bool) -> dict[str, Any]:
    if not training:
        with torch.no_grad():
            return {"output": model(ids)}
    output = model(ids)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters()), strict=True)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)
    return {"output": output} | {n: g for n, g in zip(names, grads, strict=True) if g is not None}


@pytest.mark.parametrize("put_back", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weigh", WAYS, ids=lambda f: f.__name__)
def test_results_are_eagers(weigh, training, put_back, monkeypatch):
    if put_back:
        monkeypatch.setattr(price, "LEAST_GAIN", 1e9)
    model = Attend(weigh)
    ids = torch.randint(1, 9, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[1, :4], ids[2, 9:] = 0, 0
    expected = results(model, ids, training)
    fusekit.optimize(model)
    found = results(model, ids, training)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("weigh", WAYS, ids=lambda f: f.__name__)
def test_verify_passes_them(weigh):
    model = fusekit.optimize(Attend(weigh))
    ids = torch.randint(1, 9, (3, 12))
    ids[1, :4] = 0
    certificate = fusekit.verify(model, ids)
    assert certificate.ok, str(certificate)


def test_a_bias_that_is_dropped_out_is_drawn_once(monkeypatch):
    """What is random is not made again where a site is put back."""

    def weigh(self: Attend, scores: Tensor, ids: Tensor) -> Tensor:
        bias = F.dropout(torch.ones(12, 12), 0.5, True)
        mask = (ids[:, None, None] == 0).float() * -1e9
        self.drawn = bias
        return torch.softmax((scores + bias) + mask, -1) * (bias == bias)

    monkeypatch.setattr(price, "LEAST_GAIN", 1e9)
    model = fusekit.optimize(Attend(weigh))
    ids = torch.randint(1, 9, (2, 12))
    with torch.no_grad():
        found = model(ids)
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in model.qkv(model.embed(ids)).chunk(3, -1))
        expected = torch.softmax(q @ k.mT * 0.3 + model.drawn, -1) @ v
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_two_results_that_are_equal_have_memory_of_their_own(monkeypatch):
    monkeypatch.setattr(price, "LEAST_GAIN", 1e9)

    class Twice(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return tuple((torch.softmax(q @ k.mT * 0.3, -1) @ v).transpose(1, 2) for _ in range(2))

    with torch.no_grad():
        first, second = fusekit.optimize(Twice())(*torch.randn(3, 1, 2, 12, 8))
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second)


def test_a_checkpoint_without_tensors_is_captured():
    class Ones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + checkpoint(lambda: torch.ones(8), use_reentrant=False)

    model = Ones()
    x = torch.randn(4, 8)
    expected = model(x)
    fusekit.optimize(model)
    torch.testing.assert_close(model(x), expected)
    assert not any("IndexError" in str(reason) for reason in fusekit.explain(model).graph_breaks)


def test_a_bias_cut_to_whole_numbers_is_no_alibi():
    class Cut(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            slopes = torch.tensor([0.5, 0.25]).view(2, 1, 1)
            bias = (slopes * torch.arange(12).view(1, 1, 12)).expand(3, 2, 1, 12).reshape(6, 1, 12)
            bias = bias.long().float().reshape(3, 2, 1, 12)
            return torch.softmax(q @ k.mT * 0.3 + bias, -1) @ v

    model, args = Cut(), tuple(torch.randn(3, 3, 2, 12, 8))
    expected = model(*args)
    torch.testing.assert_close(fusekit.optimize(model)(*args), expected)
