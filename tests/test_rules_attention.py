"""Rules for attention: every spelling, every kind of mask, grouped heads, dropout; and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Functional, calls, capture, check, reasons, sites
from torch import Tensor

INF = math.inf
B, H, T, D = 2, 2, 5, 4
QKV = ((B, H, T, D),) * 3
CAUSAL = torch.ones(T, T).tril()
PAD = torch.tensor([[True] * T, [True] * 3 + [False] * 2])[:, None, None, :]


def _probabilities(scores: Tensor, **kwargs: Any) -> Tensor:
    return torch.softmax(scores, dim=-1, **kwargs)


def _kT(k: Tensor) -> Tensor:
    return k.transpose(-2, -1)


def _causal() -> Tensor:
    return torch.arange(T)[None, :] <= torch.arange(T)[:, None]


Spelling = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# name: (function of the input and q, k, v; is it causal; has it a mask)
SPELLINGS: dict[str, tuple[Spelling, bool, bool]] = {
    "sdpa": (lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v), False, False),
    "sdpa causal": (lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), True, False),
    "sdpa scale": (lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), False, False),
    "sdpa mask": (lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, x > -1), False, True),
    "sdpa causal mask": (lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, _causal()), True, False),
    "sdpa both": (
        lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, _causal() & (x > -3)),
        True,
        True,
    ),
    "sdpa added": (lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, x), False, True),
    "nanoGPT": (
        lambda x, q, k, v: (
            _probabilities((q @ _kT(k) * (1 / math.sqrt(D))).masked_fill(torch.ones(T, T).tril() == 0, -INF))
            @ v
        ),
        True,
        False,
    ),
    "nanoGPT, mask as input": (
        lambda x, q, k, v: _probabilities((q @ _kT(k) * 0.5).masked_fill((x > -1).float() == 0, -INF)) @ v,
        False,
        True,
    ),
    "divided": (lambda x, q, k, v: _probabilities(torch.matmul(q, _kT(k)) / math.sqrt(D)) @ v, False, False),
    "unscaled": (lambda x, q, k, v: _probabilities(q @ _kT(k)) @ v, False, False),
    "scaled query": (lambda x, q, k, v: _probabilities((q * 0.5) @ _kT(k)) @ v, False, False),
    "mT": (lambda x, q, k, v: _probabilities(0.5 * (q @ k.mT)) @ v, False, False),
    "permute": (lambda x, q, k, v: _probabilities(q @ k.permute(0, 1, 3, 2)) @ v, False, False),
    "key transposed before": (
        lambda x, q, k, v: _probabilities(q @ k.reshape(B, H, D, T)) @ v,
        False,
        False,
    ),
    "softmax in float32": (
        lambda x, q, k, v: _probabilities(q @ _kT(k), dtype=torch.float32).to(q.dtype) @ v,
        False,
        False,
    ),
    "added mask": (lambda x, q, k, v: _probabilities(q @ _kT(k) * 0.5 + x) @ v, False, True),
    "added causal mask": (
        lambda x, q, k, v: (
            _probabilities(torch.triu(torch.full((T, T), -INF), diagonal=1) + q @ _kT(k) * 0.5) @ v
        ),
        True,
        False,
    ),
    "where": (lambda x, q, k, v: _probabilities(torch.where(x > -1, q @ _kT(k), -INF)) @ v, False, True),
    "where, forbidden first": (
        lambda x, q, k, v: _probabilities(torch.where(x < -1, -INF, q @ _kT(k))) @ v,
        False,
        True,
    ),
    "capped": (lambda x, q, k, v: _probabilities(torch.tanh(q @ _kT(k) * 0.5 / 2.0) * 2.0) @ v, False, False),
    "capped, added mask": (
        lambda x, q, k, v: _probabilities(torch.tanh(q @ _kT(k) / 2.0) * 2.0 + x) @ v,
        False,
        True,
    ),
    "capped, causal": (
        lambda x, q, k, v: (
            _probabilities((3.0 * torch.tanh(q @ _kT(k) * 0.2)).masked_fill(~_causal(), -INF)) @ v
        ),
        True,
        False,
    ),
    "learned number": (lambda x, q, k, v: _probabilities(q @ _kT(k) + v.sum()) @ v, False, True),
    "learned sdpa mask": (
        lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, k.mean((1, 3))[:, None, None]),
        False,
        True,
    ),
    "learned bias and causal in one": (
        lambda x, q, k, v: (
            _probabilities(q @ _kT(k) + (torch.where(_causal(), 0.0, -1e9) + v.mean(-1, True).mT)) @ v
        ),
        True,
        True,
    ),
    "learned bias, then causal": (
        lambda x, q, k, v: (
            _probabilities((q @ _kT(k) + v.mean(-1, True).mT) + torch.where(_causal(), 0.0, -1e9)) @ v
        ),
        True,
        True,
    ),
    "causal by -1e9": (
        lambda x, q, k, v: _probabilities((q @ _kT(k)).masked_fill(~_causal(), -1e9)) @ v,
        True,
        False,
    ),
}


def arguments(regions: list[Any]) -> dict[str, Any]:
    (node,) = (n for r in regions for n in r.module.graph.nodes if "fusion" in n.meta)
    names = [a.name for a in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=True))


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling(name: str) -> None:
    function, causal, masked = SPELLINGS[name]
    torch.manual_seed(0)
    regions = check(Functional(function, *QKV), torch.randn(B, 1, T, T))
    assert sites(regions) == {"attention": 1}, reasons(regions)
    given = arguments(regions)
    assert (given["causal"], given["mask"] is not None) == (causal, masked)
    assert not any(
        calls(regions, n) for n in ("softmax", "matmul", "scaled_dot_product_attention", "masked_fill")
    )


@pytest.mark.parametrize("name", ["nanoGPT", "softmax in float32", "sdpa causal", "divided", "added mask"])
def test_low_precision(name: str) -> None:
    torch.manual_seed(0)
    model = Functional(SPELLINGS[name][0], *QKV).to(torch.bfloat16)
    regions = check(model, torch.randn(B, 1, T, T, dtype=torch.bfloat16), tolerance=3e-2)
    assert sites(regions) == {"attention": 1}, reasons(regions)


def _repeat(k: Tensor) -> Tensor:
    return k[:, :, None].expand(B, H, 3, T, D).reshape(B, 3 * H, T, D)


GROUPED: dict[str, Spelling] = {
    "repeat_kv": lambda x, q, k, v: F.scaled_dot_product_attention(q, _repeat(k), _repeat(v)),
    "repeat_interleave": lambda x, q, k, v: F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
    ),
    "enable_gqa": lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "written out": lambda x, q, k, v: _probabilities(q @ _kT(_repeat(k))) @ _repeat(v),
}


@pytest.mark.parametrize("name", GROUPED)
def test_repeated_heads_are_folded(name: str) -> None:
    regions = check(Functional(GROUPED[name], (B, 3 * H, T, D), *QKV[1:]), torch.zeros(1))
    assert sites(regions) == {"attention": 1}
    assert [shape[1] for shape in regions[0].fusions[0].shapes] == [3 * H, H, H]
    assert calls(regions, "expand") == calls(regions, "repeat_interleave") == 0


def test_heads_repeated_in_another_order_are_not_folded() -> None:
    def tiled(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))

    regions = check(Functional(tiled, (B, 3 * H, T, D), *QKV[1:]), torch.zeros(1))
    assert [shape[1] for shape in regions[0].fusions[0].shapes] == [3 * H] * 3


def test_only_one_of_k_and_v_repeated_is_not_folded() -> None:
    def one(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, _repeat(k), v)

    regions = check(Functional(one, (B, 3 * H, T, D), (B, H, T, D), (B, 3 * H, T, D)), torch.zeros(1))
    assert [shape[1] for shape in regions[0].fusions[0].shapes] == [3 * H] * 3


REFUSALS: dict[str, tuple[Spelling, str]] = {
    "softmax over queries": (lambda x, q, k, v: torch.softmax(q @ _kT(k), -2) @ v, "-2 where -1"),
    "probabilities returned": (
        lambda x, q, k, v: (lambda p: p @ v + p.sum())(_probabilities(q @ _kT(k))),
        "also read by",
    ),
    "filled with -1e9": (
        lambda x, q, k, v: _probabilities((q @ _kT(k)).masked_fill(x > 0, -1e9)) @ v,
        "where a whole row is forbidden",
    ),
    "filled with -100": (
        lambda x, q, k, v: _probabilities((q @ _kT(k)).masked_fill(~_causal(), -100.0)) @ v,
        "come near to",
    ),
    "dropout on a CPU": (lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), "faster"),
    "dropout written out": (lambda x, q, k, v: F.dropout(_probabilities(q @ _kT(k)), 0.5) @ v, "faster"),
    "computed scale": (lambda x, q, k, v: _probabilities(q @ _kT(k) * x.sum()) @ v, ""),
    "capped after the mask": (
        lambda x, q, k, v: _probabilities(torch.tanh((q @ _kT(k) + x) / 2.0) * 2.0) @ v,
        "",
    ),
    "cap of the wrong sign": (
        lambda x, q, k, v: _probabilities(torch.tanh(q @ _kT(k) / 2.0) * -2.0) @ v,
        "no capped scores",
    ),
    "three dimensions": (lambda x, q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), "dimensions"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_must_not_fuse_is_left_and_named(name: str) -> None:
    function, reason = REFUSALS[name]
    model, x = Functional(function, *QKV), torch.randn(B, 1, T, T)
    torch.manual_seed(1)
    result, regions = capture(model, x)
    assert not sites(regions)
    torch.manual_seed(1)
    torch.testing.assert_close(result, model(x))
    assert reason in reasons(regions), reasons(regions)


def test_eager_recomputes_the_mask_the_model_had() -> None:
    """The replaced graph computes a causal mask that the op no longer takes: a wrong recognition shows."""
    torch.manual_seed(0)
    model = Functional(SPELLINGS["sdpa both"][0], *QKV)
    x = torch.randn(B, 1, T, T)
    _, (region,) = capture(model, x)
    (fusion,) = region.fusions
    assert fusion.eager is not None and fusion.inputs == (None,) * 4
    q, k, v = torch.randn(3, B, H, T, D)
    mask = x > -3
    expected = F.scaled_dot_product_attention(q, k, v, _causal() & mask)
    torch.testing.assert_close(fusion.eager(q, k, v, mask), expected)
