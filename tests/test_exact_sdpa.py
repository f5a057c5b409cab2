"""Rows whose additive mask is finfo.min throughout: on a CPU torch's kernel has no right gradient there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusekit
from fusekit.exact_sdpa import BySoftmax


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def masked(T: int = 24) -> Tensor:
    """(1, 1, T, T), causal, where the first rows are padding and see nothing."""
    seen = torch.ones(T, T, dtype=torch.bool).tril() & (torch.arange(T) >= 5)
    return torch.zeros(T, T).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def gradients(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask).sum(), (q, k, v))


@pytest.mark.parametrize("place", ["by hand", "in a graph"])
def test_gradients_of_rows_that_see_nothing_are_softmaxs(place: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 16, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    mask = masked().double()
    truth = torch.autograd.grad((((q @ k.mT) / 4 + mask).softmax(-1) @ v).sum(), (q, k, v))
    run = F.scaled_dot_product_attention
    if place == "in a graph":
        run = torch.ops.aten.scaled_dot_product_attention.default
    with BySoftmax():
        found = torch.autograd.grad(run(q, k, v, mask).sum(), (q, k, v))
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, exact)
    wrong = gradients(q, k, v, mask)
    assert not torch.allclose(wrong[0], truth[0], rtol=0.1)  # else torch has it right, and this can go


def test_verify_passes_what_eager_has_wrong() -> None:
    torch.manual_seed(0)
    model = fusekit.optimize(Attend())
    x = torch.randn(2, 24, 32, requires_grad=True)
    model(x, masked()).sum().backward()
    certificate = fusekit.verify(model, x, masked())
    assert certificate.ok, str(certificate)
    assert [site.op for site in certificate.sites if not site.reverted or site.ok].count("attention") == 1
