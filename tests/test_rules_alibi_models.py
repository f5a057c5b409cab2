"""ALiBi of models that round or scale it: Falcon, MPT in low precision; and where rounding forbids slopes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Functional, calls, capture, check, reasons, sites
from test_rules_alibi import (
    LEFT,
    QKV,
    SLOPES,
    D,
    H,
    Spelling,
    T,
    _attend,
    _causal,
    _distance,
    _scores,
    attentions,
    mpt,
)  # fmt: skip
from torch import Tensor, nn

import fusekit
from fusekit.passes import price

INF = math.inf
KINDS: dict[str, dict[str, Any]] = {
    "own keys": {"multi_query": False},
    "one head of keys": {"multi_query": True},
    "groups": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


def falcon(implementation: str, kind: str = "own keys", alibi: bool = True) -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=alibi,
        use_cache=False, attn_implementation=implementation, **KINDS[kind],
    )  # fmt: skip
    return FalconForCausalLM(config)


def tokens(length: int = 9) -> Tensor:
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_falcons_bias_is_one_row_beside_causal(implementation: str, kind: str, dynamic: bool | None) -> None:
    """At 600 tokens its bfloat16 bias is up to 2 away from slopes times places, which float32 shows."""
    regions = check(falcon(implementation, kind), tokens(600), dynamic=dynamic, tolerance=1e-4)
    found = attentions(regions)
    assert len(found) == 2, reasons(regions)
    for given in found:
        assert given["causal"] and given["slopes"] is None
        assert str(tuple(given["mask"].meta["val"].shape)[1:3]) == "(4, 1)"  # heads, and no queries
    assert not calls(regions, "softmax")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_falcon_with_padding(implementation: str) -> None:
    """Rows without a key: eager's flash kernel on a CPU gives them a gradient that is n times too large, as
    finfo.min + log(n) is finfo.min; its plain kernel does not."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        regions = check(falcon(implementation), tokens(), attention_mask=LEFT, tolerance=1e-4)
    found = attentions(regions)
    assert len(found) == 2 and all(given["mask"] is not None for given in found), reasons(regions)


@pytest.mark.parametrize("kind", KINDS)
def test_falcon_with_rope_written_out(kind: str) -> None:
    regions = check(falcon("eager", kind, alibi=False), tokens(), tolerance=1e-4)
    found = attentions(regions)
    assert len(found) == 2, reasons(regions)
    assert all(given["causal"] and given["mask"] is None for given in found)
    assert {given["k"].meta["val"].shape[1] for given in found} == {1 if kind == "one head of keys" else 4}


def test_one_head_of_keys_is_not_taken_for_many() -> None:
    """Keys of one head and values of many, or two heads of keys, are no shared keys."""

    def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(_scores(q, k[:, :1]) + torch.zeros(T, T).masked_fill(~_causal(), -INF), v)

    regions = check(Functional(attend, *QKV), SLOPES)
    assert not sites(regions)["attention"]


def test_both_layers_of_falcon_read_one_bias() -> None:
    regions = check(falcon("eager"), tokens(), tolerance=1e-4)
    first, second = attentions(regions)
    assert first["mask"] is second["mask"]


def _nearer_than_eager(model: nn.Module, *args: Tensor) -> list[dict[str, Any]]:
    """In bfloat16: no further from float64 than eager is, but for rounding."""
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        eager = model(*args).logits
        fused, regions = capture(model, *args)
        truth = model.double()(*args).logits
    errors = [float((x.double() - truth).norm() / truth.norm()) for x in (fused.logits, eager)]
    assert errors[0] <= 1.1 * errors[1] + 1e-3, errors
    return attentions(regions)


@pytest.mark.parametrize("build", [lambda: falcon("sdpa"), mpt], ids=["Falcon", "MPT"])
def test_in_bfloat16_the_bias_is_slopes(build: Callable[[], nn.Module]) -> None:
    found = _nearer_than_eager(build(), tokens())
    assert len(found) == 2
    assert all(given["slopes"] is not None and given["causal"] and given["mask"] is None for given in found)


def test_falcon_written_out_in_bfloat16() -> None:
    found = _nearer_than_eager(falcon("eager"), tokens())
    assert len(found) == 2 and all(given["causal"] and given["mask"] is not None for given in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mpt_with_padding_is_fused_where_no_gradient_is_asked_for(dtype: torch.dtype) -> None:
    """Rows without a key are shared out evenly, as eager does."""
    model = mpt().to(dtype).eval()
    with torch.no_grad():
        expected = model(tokens(), attention_mask=LEFT).logits
        result, regions = capture(model, tokens(), attention_mask=LEFT)
    found = attentions(regions)
    assert len(found) == 2, reasons(regions)
    assert all(given["slopes"] is not None and given["mask"] is not None for given in found)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(result.logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("inside", [False, True], ids=["gradients", "switched on inside"])
def test_mpt_with_padding_stays_eager_where_gradients_are(inside: bool) -> None:
    """Eager gives the scores of a row without keys no gradient, and a sum would."""
    model = mpt()

    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.inner(ids, attention_mask=mask).logits

    if not inside:
        regions = check(model, tokens(), attention_mask=LEFT, tolerance=1e-4)
    else:
        with torch.no_grad():
            _, regions = capture(Switched(), tokens(), LEFT)
    assert not sites(regions)["attention"] and "shares it out evenly" in reasons(regions)


@pytest.mark.parametrize("fill, fused", [(-3e38, True), (-1e9, False), (-65504.0, False)])
def test_what_a_score_may_show_in_is_not_added(fill: float, fused: bool) -> None:
    def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(_scores(q, k).masked_fill(x[:, None, None] == 0, fill), v)

    model = Functional(attend, *QKV)
    x = torch.tensor([[0.0] * T, [0.0] * 2 + [1.0] * (T - 2)])  # the first sees no key
    with torch.no_grad():
        expected = model(x)
        result, regions = capture(model, x)
    assert bool(sites(regions)["attention"]) == fused, reasons(regions)
    torch.testing.assert_close(result, expected)


# A bias that is rounded more coarsely than the scores is what the model computes with.
ROUNDED: dict[str, Spelling] = {
    "the bias": lambda x, q, k, v: _added((x[:, None, None] * _distance()).bfloat16().float(), q, k, v),
    "the bias, in float16": lambda x, q, k, v: _added(
        (x[:, None, None] * _distance()).half().float(), q, k, v
    ),
    "the product": lambda x, q, k, v: _added((x.bfloat16()[:, None, None] * _distance()).float(), q, k, v),
    "the distance": lambda x, q, k, v: _added(x[:, None, None] * _distance().bfloat16().float(), q, k, v),
    "its absolute value": lambda x, q, k, v: _added(
        -x[:, None, None] * _distance().abs().bfloat16().float(), q, k, v
    ),
}  # fmt: skip
NOT_ROUNDED: dict[str, Spelling] = {
    "slopes alone": lambda x, q, k, v: _added(x.bfloat16().float()[:, None, None] * _distance(), q, k, v),
    "to more": lambda x, q, k, v: _added((x[:, None, None] * _distance()).double().float(), q, k, v),
    "scaled": lambda x, q, k, v: _added((x[:, None, None] * _distance()) / 3.0, q, k, v),
    "scaled by less than nothing": lambda x, q, k, v: _added(
        (-x[:, None, None] * _distance().float()) * -0.7, q, k, v
    ),
}  # fmt: skip


def _added(bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~_causal(), -INF))


@pytest.mark.parametrize("name", [*ROUNDED, *NOT_ROUNDED])
def test_a_coarser_rounding_keeps_the_bias(name: str) -> None:
    torch.manual_seed(0)
    regions = check(Functional((ROUNDED | NOT_ROUNDED)[name], *QKV), SLOPES * 1.01)
    (given,) = attentions(regions)
    assert (given["slopes"] is None) == (name in ROUNDED) == (given["mask"] is not None)


class Learned(nn.Module):
    """ALiBi with slopes that are trained, written out or through F.scaled_dot_product_attention."""

    def __init__(self, called: bool, absolute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called, self.absolute = called, absolute
        self.qkv = nn.Linear(D * H, 3 * D * H)
        self.slopes = nn.Parameter(SLOPES.clone())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        distance = -_distance().abs() if self.absolute else _distance()
        bias = self.slopes[:, None, None] * distance
        if self.called:
            return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~_causal(), -INF))
        return _attend((_scores(q, k) + bias).masked_fill(~_causal(), -INF), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_learned_slopes_are_fused_with_their_gradient(
    called: bool, absolute: bool, dtype: torch.dtype
) -> None:
    """As an additive mask, beside causal where no row can be left without a key."""
    model = Learned(called, absolute).to(dtype)
    twin, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    x = torch.randn(2, T, H * D, dtype=dtype)
    direction = torch.randn(2, H, T, D)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for each, given in ((model, x), (truth, x.double())):
            each(given).backward(direction.to(given.dtype))
    result, regions = capture(twin, x)
    result.backward(direction.to(dtype))
    (given_,) = attentions(regions)
    assert given_["slopes"] is None and given_["mask"] is not None and given_["causal"]
    for (name, wanted), eager, fused in zip(
        truth.named_parameters(), model.parameters(), twin.parameters(), strict=True
    ):
        errors = [float((p.grad.double() - wanted.grad).norm() / wanted.grad.norm()) for p in (fused, eager)]
        assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps, (name, errors)


class Off(nn.Module):
    """Trained slopes, of which the bias is made where gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.slopes = nn.Linear(D * H, 3 * D * H), nn.Parameter(SLOPES.clone())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        with torch.no_grad():
            bias = self.slopes[:, None, None] * torch.arange(T)
        return F.scaled_dot_product_attention(q, k, v, bias)


@pytest.mark.parametrize("least_gain", [0.0, 1e9], ids=["fused", "put back"])
def test_slopes_without_a_gradient_get_none(least_gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price, "LEAST_GAIN", least_gain)
    x = torch.randn(2, T, H * D)
    expected = Off()(x)
    model = fusekit.optimize(Off())
    result = model(x)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert model.slopes.grad is None and model.qkv.weight.grad is not None
