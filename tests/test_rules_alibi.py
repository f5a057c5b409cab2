"""Rules for ALiBi: Bloom, MPT and hand-written; what stays a tensor; documents in models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Functional, calls, check, reasons, sites
from torch import Tensor, nn

INF = math.inf
B, H, T, D = 2, 4, 6, 4
QKV = ((B, H, T, D),) * 3
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attentions(regions: list[Any]) -> list[dict[str, Any]]:
    nodes = [n for r in regions for n in r.module.graph.nodes if "fusion" in n.meta]
    names = [a.name for a in torch.ops.fusekit.attention.default._schema.arguments]
    taken = [n for n in nodes if n.target is torch.ops.fusekit.attention.default]
    return [dict(zip(names, n.args, strict=True)) for n in taken]


def _distance() -> Tensor:
    return torch.arange(T)[None, :] - torch.arange(T)[:, None]


def _causal() -> Tensor:
    return torch.arange(T)[None, :] <= torch.arange(T)[:, None]


def _bias(slopes: Tensor) -> Tensor:
    return slopes[:, None, None] * _distance()[None]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * 0.5


def _attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


# `x` holds the slopes.
SPELLINGS: dict[str, Spelling] = {
    "masked_fill": lambda x, q, k, v: _attend((_scores(q, k) + _bias(x)).masked_fill(~_causal(), -INF), v),
    "-1e9": lambda x, q, k, v: _attend((_scores(q, k) + _bias(x)).masked_fill(~_causal(), -1e9), v),
    "added mask": lambda x, q, k, v: _attend(
        (_scores(q, k) + _bias(x)) + torch.triu(torch.full((T, T), -INF), diagonal=1), v
    ),
    "added in one": lambda x, q, k, v: _attend(
        _scores(q, k) + (_bias(x)[None] + torch.triu(torch.full((T, T), -INF), diagonal=1)), v
    ),
    "sdpa": lambda x, q, k, v: F.scaled_dot_product_attention(
        q, k, v, _bias(x).masked_fill(~_causal(), -INF)
    ),
    "sdpa, where": lambda x, q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.where(_causal(), x.view(1, H, 1, 1) * _distance(), -INF)
    ),
    "absolute": lambda x, q, k, v: _attend(
        (_scores(q, k) + -x.view(H, 1, 1) * _distance().abs().float()).masked_fill(~_causal(), -INF), v
    ),
    "absolute, negated": lambda x, q, k, v: _attend(
        (_scores(q, k) + x.view(H, 1, 1) * -(_distance().float().abs())).masked_fill(~_causal(), -INF), v
    ),
    "floating arange": lambda x, q, k, v: _attend(
        (_scores(q, k) + x[:, None, None] * (torch.arange(float(T)) - torch.arange(float(T))[:, None]))
        .masked_fill(~_causal(), -INF), v
    ),
    "key places": lambda x, q, k, v: _attend(
        (_scores(q, k) + x[:, None, None] * torch.arange(T)).masked_fill(~_causal(), -INF), v
    ),
    "no mask": lambda x, q, k, v: _attend(_scores(q, k) + _bias(x), v),
    "capped": lambda x, q, k, v: _attend(torch.tanh(_scores(q, k) / 3.0) * 3.0 + _bias(x), v),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling(name: str) -> None:
    torch.manual_seed(0)
    regions = check(Functional(SPELLINGS[name], *QKV), SLOPES)
    assert sites(regions) == {"attention": 1}, reasons(regions)
    (given,) = attentions(regions)
    assert given["slopes"] is not None and given["mask"] is None and given["places"] is None
    assert given["causal"] == (name not in ("no mask", "capped"))
    assert not calls(regions, "softmax") and not calls(regions, "mul")


def test_low_precision_is_nearer_to_float64_than_the_rounded_bias() -> None:
    torch.manual_seed(0)
    model = Functional(SPELLINGS["masked_fill"], *QKV).to(torch.bfloat16)
    check(model, SLOPES.to(torch.bfloat16), tolerance=3e-2)


# Fuses, but the bias stays a tensor.
KEPT: dict[str, Spelling] = {
    "absolute, both ways": lambda x, q, k, v: _attend(
        _scores(q, k) + x[:, None, None] * -_distance().abs(), v
    ),
    "absolute of a shifted distance": lambda x, q, k, v: _attend(
        (_scores(q, k) + x[:, None, None] * -(_distance() + 1).abs()).masked_fill(~_causal(), -INF), v
    ),
    "absolute, keys ahead": lambda x, q, k, v: _attend(
        (_scores(q, k) + x[:, None, None] * -_distance().abs())
        .masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(1), -INF), v
    ),
    "twice the distance": lambda x, q, k, v: _attend(_scores(q, k) + x[:, None, None] * (_distance() * 2), v),
    "every other": lambda x, q, k, v: _attend(
        _scores(q, k) + x[:, None, None] * torch.arange(0, 2 * T, 2), v
    ),
    "root of the distance": lambda x, q, k, v: _attend(
        _scores(q, k) + x[:, None, None] * _distance().abs().sqrt(), v
    ),
    "a slope of each query": lambda x, q, k, v: _attend(
        _scores(q, k) + x.repeat(2)[:T][None, :, None] * _distance(), v
    ),
    "learned slopes": lambda x, q, k, v: _attend(
        _scores(q, k) + q.mean((0, 2, 3))[:, None, None] * _distance(), v
    ),
    "a distance of data": lambda x, q, k, v: _attend(
        _scores(q, k) + x[:, None, None] * (_distance() + x.long()[:1]).clamp(max=2), v
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_is_nearly_alibi_stays_a_tensor(name: str) -> None:
    torch.manual_seed(0)
    regions = check(Functional(KEPT[name], *QKV), SLOPES)
    assert sites(regions) == {"attention": 1}, reasons(regions)
    (given,) = attentions(regions)
    assert given["slopes"] is None and given["mask"] is not None


BOTH: dict[str, Spelling] = {
    "filled": lambda x, q, k, v: _attend(
        (_scores(q, k) + v.mean(-1, True).mT).masked_fill(x[:, None, None] > 0.9, -INF), v
    ),
    "filled, a bias of heads": lambda x, q, k, v: _attend(
        (_scores(q, k) + v.mean((0, 3))[:, None, :])
        .masked_fill((x[:, None, None] > 0.9) | ~_causal(), -INF), v
    ),
    "added": lambda x, q, k, v: _attend(_scores(q, k) + v.mean(-1, True).mT + x[:, None, None], v),
    "added, low": lambda x, q, k, v: _attend(
        _scores(q, k) + v.mean(-1, True).mT + torch.where(x < 0.9, 0.0, -1e9)[:, None, None], v
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_a_bias_and_a_mask_that_are_both_tensors_are_one(name: str) -> None:
    """The bias with its gradient, also where the mask fills it."""
    x = torch.rand(B, T, generator=torch.Generator().manual_seed(0))
    x[:, 0], x[0, 1] = 0.1, 0.95
    regions = check(Functional(BOTH[name], *QKV), x)
    (given,) = attentions(regions)
    assert given["mask"].meta["val"].dtype == torch.float32 and given["slopes"] is None


def _bloom(**settings: Any) -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, use_cache=False, **settings)
    return BloomForCausalLM(config)


def mpt() -> nn.Module:
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    config = MptConfig(
        vocab_size=50, d_model=32, n_layers=2, n_heads=4, max_seq_len=12, expansion_ratio=2, use_cache=False
    )
    return MptForCausalLM(config)


IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


@pytest.mark.parametrize("dynamic", [None, True])
def test_bloom(dynamic: bool | None) -> None:
    regions = check(_bloom(), IDS, dynamic=dynamic, tolerance=1e-4)
    found = attentions(regions)
    assert len(found) == 2, reasons(regions)
    for given in found:
        assert given["slopes"] is not None and given["causal"] and given["mask"] is None
    assert not calls(regions, "baddbmm") and not calls(regions, "softmax")


def test_bloom_with_padding_has_places_and_an_added_mask() -> None:
    regions = check(_bloom(), IDS, attention_mask=LEFT, tolerance=1e-4)
    found = attentions(regions)
    assert len(found) == 2, reasons(regions)
    for given in found:
        assert given["slopes"] is not None and given["places"] is not None and given["mask"] is not None


@pytest.mark.parametrize("dynamic", [None, True])
def test_mpt(dynamic: bool | None) -> None:
    regions = check(mpt(), IDS, dynamic=dynamic, tolerance=1e-4)
    found = attentions(regions)
    assert len(found) == 2, reasons(regions)
    for given in found:
        assert given["slopes"] is not None and given["causal"] and given["mask"] is None


def _llama(implementation: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_sequences(implementation: str) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]]).expand(2, -1)
    regions = check(_llama(implementation), IDS, position_ids=positions, tolerance=1e-4)
    found = attentions(regions)
    assert len(found) == 2, reasons(regions)
    for given in found:
        assert given["documents"] is not None and given["causal"] and given["mask"] is None
