"""FP8 attention under verify: what is right is certified, what is wrong or loses too much is reverted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_fp8_checks import BLOCK, HEAD, gpt, tokens
from torch import Tensor

import fusekit
from fusekit import Recipe, site_check

pytestmark = pytest.mark.usefixtures("checked")


@pytest.mark.parametrize("recipe", [HEAD, BLOCK], ids=["head", "block"])
def test_verify_certifies_the_sites(recipe: Recipe) -> None:
    model, x = gpt(layers=1), tokens()
    fusekit.optimize(model, precision=recipe)
    certificate = fusekit.verify(model, x, x)
    (site,) = (s for s in certificate.sites if s.op == "attention_fp8")
    assert certificate.ok and not site.reverted


def _unscaled(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return torch.ops.fusekit.attention_fp8(q, k, v * 1.05, *rest)


def _shifted_mask(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, *rest: Any) -> Tensor:
    return torch.ops.fusekit.attention_fp8(q, k, v, causal, scale, None, -1, *rest[2:])


def _other_scale(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, *rest: Any) -> Tensor:
    return torch.ops.fusekit.attention_fp8(q, k, v, causal, 0.8 * q.shape[-1] ** -0.5, *rest)


class _DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 1.1 * grads[0]


def _long_gradient(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return torch.ops.fusekit.attention_fp8(q, _DoubledGradient.apply(k), v, *rest)


@pytest.mark.parametrize("bug", [_unscaled, _shifted_mask, _other_scale, _long_gradient])
def test_verify_reverts_a_site_that_is_wrong(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = gpt(layers=1, width=64), torch.randint(64, (4, 32))
    with torch.no_grad():  # so that scores matter
        model.blocks[0].attention.qkv.weight.mul_(8)
    fusekit.optimize(model, precision=HEAD)
    real = site_check.call_target
    ours = torch.ops.fusekit.attention_fp8.default
    monkeypatch.setattr(site_check, "call_target", lambda target: bug if target is ours else real(target))
    with pytest.warns(UserWarning, match="reverted attention_fp8_0"):
        certificate = fusekit.verify(model, x, x)
    (site,) = (s for s in certificate.sites if s.op == "attention_fp8")
    assert site.reverted and not certificate.ok
    assert any("reverted by verify" in r.reason for r in fusekit.explain(model).refused)


def test_verify_reverts_what_loses_too_much() -> None:
    """Scores of hundreds: an error of a percent in q is one of several in the exponent."""
    model, x = gpt(layers=1, width=64), torch.randint(64, (4, 32))
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight.mul_(60)
    fusekit.optimize(model, precision=HEAD)
    with pytest.warns(UserWarning, match="FP8 loses"):
        certificate = fusekit.verify(model, x, x)
    (site,) = (s for s in certificate.sites if s.op == "attention_fp8")
    assert site.reverted
