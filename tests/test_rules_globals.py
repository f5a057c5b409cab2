"""Rules for windows on both sides and global tokens: hand-written and Hugging Face's; what stays a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Functional, calls, check, reasons, sites
from test_rules_alibi import attentions
from torch import Tensor, nn
from transformers.masking_utils import or_masks, sliding_window_bidirectional_mask_function

INF = math.inf
B, H, T, D = 2, 4, 9, 4
QKV = ((B, H, T, D),) * 3
FLAGS = torch.zeros(B, T, dtype=torch.bool)
FLAGS[0, 0] = FLAGS[1, 4] = FLAGS[1, 7] = True

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _distance() -> Tensor:
    return torch.arange(T)[None, :] - torch.arange(T)[:, None]


def _near() -> Tensor:
    return _distance().abs() <= 2


def _both(flags: Tensor) -> Tensor:
    return flags[:, None, :, None] | flags[:, None, None, :]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * 0.5


def _attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def _transformers(flags: Tensor) -> Tensor:
    batch, i = torch.arange(B)[:, None, None, None], torch.arange(T)
    near = sliding_window_bidirectional_mask_function(2)
    mask = or_masks(near, lambda b, h, q, k: flags[b, q] | flags[b, k])
    return mask(batch, torch.zeros(1, 1, 1, 1).long(), i[None, None, :, None], i[None, None, None, :])


# `x` holds the flags.
SPELLINGS: dict[str, Spelling] = {
    "sdpa": lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, _near() | _both(x)),
    "transformers": lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, _transformers(x)),
    "masked_fill": lambda x, q, k, v: _attend(_scores(q, k).masked_fill(~(_near() | _both(x)), -INF), v),
    "-1e9": lambda x, q, k, v: _attend(_scores(q, k).masked_fill(~(_near() | _both(x)), -1e9), v),
    "forbidden": lambda x, q, k, v: _attend(
        _scores(q, k).masked_fill((_distance().abs() > 2) & ~_both(x), -INF), v
    ),
    "where": lambda x, q, k, v: _attend(torch.where(_near() | _both(x), _scores(q, k), -INF), v),
    "added": lambda x, q, k, v: _attend(
        _scores(q, k) + torch.zeros(B, 1, T, T).masked_fill(~(_near() | _both(x)), -INF), v
    ),
    "added, where": lambda x, q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.where(_near() | _both(x), 0.0, torch.finfo(torch.float32).min)
    ),
    "one line": lambda x, q, k, v: F.scaled_dot_product_attention(
        q, k, v, (torch.abs(_distance()) < 3) | x[0][:, None] | x[0][None, :]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling(name: str) -> None:
    torch.manual_seed(0)
    regions = check(Functional(SPELLINGS[name], *QKV), FLAGS)
    assert sites(regions) == {"attention": 1}, reasons(regions)
    (given,) = attentions(regions)
    assert given["mask"] is None and given["global_ahead"]
    assert given["global_queries"] is not None and given["global_keys"] is not None
    assert (given["causal"], given["window"], given["offset"]) == (True, 5, 2)
    assert not calls(regions, "softmax")


# Fuses, but the mask stays a tensor.
KEPT: dict[str, Spelling] = {
    "low, and a row may see no key": lambda x, q, k, v: _attend(
        _scores(q, k).masked_fill(~((_distance() > 2) | _both(x)), -1e9), v
    ),
    "a width that is data": lambda x, q, k, v: F.scaled_dot_product_attention(
        q, k, v, (_distance().abs() <= x.sum()) | _both(x)
    ),
    "two windows": lambda x, q, k, v: F.scaled_dot_product_attention(
        q, k, v, _near() | (_distance() == 5) | _both(x)
    ),
    "padding of near keys only": lambda x, q, k, v: F.scaled_dot_product_attention(
        q, k, v, (_near() & ~x[:, None, None, :]) | x[:, None, :, None]
    ),
    "written": lambda x, q, k, v: F.scaled_dot_product_attention(q, k, v, _written(x)),
}


def _written(flags: Tensor) -> Tensor:
    mask = (_near() | _both(flags)).clone()
    mask[..., 3] = False
    mask[..., 3, 3] = True
    return mask


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_window_beside_global_tokens_stays_a_tensor(name: str) -> None:
    torch.manual_seed(0)
    regions = check(Functional(KEPT[name], *QKV), FLAGS)
    for given in attentions(regions):
        assert given["global_keys"] is None and given["global_queries"] is None and given["mask"] is not None


def test_alibi_of_absolute_distances_is_none_where_global_keys_are_ahead() -> None:
    """-|distance| falls with the key behind the query only, and global keys are seen ahead of it."""
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = (_distance() <= 0) & (_distance() > -4)
        bias = slopes[:, None, None] * -_distance().abs()
        return _attend((_scores(q, k) + bias).masked_fill(~(near | x[:, None, None, :]), -INF), v)

    torch.manual_seed(0)
    regions = check(Functional(attend, *QKV), FLAGS)
    assert all(given["slopes"] is None for given in attentions(regions))


class Local(nn.Module):
    """A layer as a long document model has it: windows, global tokens, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, is_global: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (t.view(B, T, H, D).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        is_global = is_global > 0
        mask = _near() | is_global[:, None, :, None] | is_global[:, None, None, :]
        mask = mask & padding.bool()[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_layer_with_padding(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    padding = (torch.arange(T) < torch.tensor([T, 6])[:, None]).long()
    regions = check(Local(), torch.randn(B, T, 16), FLAGS.long(), padding, dynamic=dynamic)
    (given,) = attentions(regions)
    assert given["global_keys"] is not None and given["window"] == 5
    assert tuple(given["mask"].meta["val"].shape)[1:3] == (1, 1)
