"""Numbers the low dtype cannot hold, and views of bits: the lowered model does what the float32 one does."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusekit

LOWEST = torch.finfo(torch.float32).min


class Scores(nn.Module):
    """Self-attention with scores treated by `mask`; `lowest` is a buffer that forbids every key."""

    def __init__(self, mask: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.mask = nn.Linear(16, 16), mask
        self.register_buffer("lowest", torch.full((6, 6), LOWEST))

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        h = self.linear(x)
        return self.mask(h @ h.mT, allowed, self.lowest).softmax(-1) @ h


def _filled_in_place(scores: Tensor, allowed: Tensor, lowest: Tensor) -> Tensor:
    flat = scores.view(4, -1)
    scores.masked_fill_(~allowed, -1e9)
    return flat.view(4, 6, 6)


def _spread(scores: Tensor, allowed: Tensor, lowest: Tensor) -> Tensor:
    """Each query's mask multiplied into place, as Longformer spreads a mask of keys over its window."""
    filled = torch.zeros_like(scores).masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores + torch.eye(6).expand(4, 6, 6) @ filled.reshape(4, 6, 6)


MASKS: dict[str, Callable[..., Tensor]] = {
    "a buffer is added": lambda scores, allowed, lowest: scores + lowest,
    "a full tensor is chosen": lambda scores, allowed, lowest: torch.where(
        allowed, scores, torch.full([], LOWEST)
    ),
    "a constant is chosen": lambda scores, allowed, lowest: torch.where(allowed, scores, torch.tensor(-1e9)),
    "a literal is filled in in place": _filled_in_place,
    "a product spreads what was filled": _spread,
}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_row_without_keys_is_shared_out_as_in_float32(mask: str, precision: str) -> None:
    torch.manual_seed(0)
    model = Scores(MASKS[mask])
    x, allowed = torch.randn(4, 6, 16), torch.rand(4, 6, 6) < 0.5
    allowed[:, 2] = False
    expected = model(x, allowed)
    lowered = fusekit.optimize(copy.deepcopy(model), precision=precision)
    result = lowered(x, allowed)
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
    for output in (expected, result):
        output.square().sum().backward()
    wanted = model.linear.weight.grad
    torch.testing.assert_close(
        lowered.linear.weight.grad, wanted, rtol=0.05, atol=0.03 * wanted.abs().max().item()
    )


class Rotated(nn.Module):
    """RoPE as Llama's own code writes it: pairs of features as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.linear(x).float().reshape(4, 6, 8, 2))
        turns = torch.polar(torch.ones(6, 8), torch.arange(48.0).view(6, 8) / (2 * math.pi))
        return torch.view_as_real(pairs * turns).flatten(2).type_as(x)


class Bits(nn.Module):
    """The sign read off the highest bit of a float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return F.relu(h) * (h.view(torch.int32) >= 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", [Rotated, Bits])
def test_views_of_bits_see_float32(kind: type[nn.Module], precision: str) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 6, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "left unoptimised" would be one
        result = fusekit.optimize(copy.deepcopy(model), precision=precision)(x)
    torch.testing.assert_close(result, model(x), rtol=0.05, atol=0.05)


class Noisy(nn.Module):
    """One draw, read by a matmul and by float32 arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(self.weight)
        return F.linear(x, noise) + 100 * noise.exp().log()


def test_noise_shaped_like_a_parameter_is_drawn_once() -> None:
    model, x = Noisy(), torch.randn(8, 8)
    torch.manual_seed(1)
    expected, state = model(x), torch.get_rng_state()
    fusekit.optimize(model, precision="bf16")
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.5)
    torch.manual_seed(1)
    model(x)
    assert torch.equal(torch.get_rng_state(), state)
