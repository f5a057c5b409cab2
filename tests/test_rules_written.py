"""Tensors written in place: what a rule reads through a copy, or drops as a copy, must be what it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Functional, capture, check, reasons, sites
from torch import Tensor


def _heads(x: Tensor, weight: Tensor) -> list[Tensor]:
    return [t.view(2, 6, 2, 4).transpose(1, 2) for t in (x @ weight).chunk(3, -1)]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)) * 0.5


def _padding(x: Tensor) -> Tensor:
    return x[:, :, 0].gt(-0.5)[:, None, None, :].expand(2, 1, 6, 6).clone()


def prefix_of_a_boolean_mask(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = _heads(x, weight)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[:, :3] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def prefix_of_an_added_mask(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = _heads(x, weight)
    mask = torch.full((6, 6), -math.inf).triu(1)
    mask[:, :3] = 0
    return (_scores(q, k) + mask).softmax(-1) @ v


def prefix_of_a_number_mask(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = _heads(x, weight)
    mask = torch.ones(6, 6).tril()
    mask[:, :3] = 1
    return _scores(q, k).masked_fill(mask == 0, -math.inf).softmax(-1) @ v


def complement_taken_before_the_write(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = _heads(x, weight)
    allowed = _padding(x)
    allowed[..., 0] = True
    forbidden = ~allowed
    allowed[..., 1] = False
    return _scores(q, k).masked_fill(forbidden, -math.inf).softmax(-1) @ v


def conjunction_taken_before_the_write(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = _heads(x, weight)
    padding = _padding(x)
    mask = padding & torch.ones(6, 6, dtype=torch.bool).tril()
    padding[..., 1] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def heads_repeated_before_the_write(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = _heads(x, weight)
    k, v = k[:, :1].clone(), v[:, :1].clone()
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    k.view(-1).mul_(3.0)
    return F.scaled_dot_product_attention(q, keys, values) + k.sum()


def copy_made_by_a_reshape(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, T, D) memory is copied here; the op's (B, T, H, D) memory would be viewed, and overwritten."""
    q, k, v = _heads(x, weight)
    out = _scores(q, k).softmax(-1) @ v
    joined = out.transpose(1, 2).reshape(2, 6, 8)
    joined.add_(1.0)
    joined.mul_(2.0)
    return joined + (out * out).sum()


def keys_put_together_in_place(x: Tensor, weight: Tensor) -> Tensor:
    """As DeepSeek-V3 joins the two parts of its keys."""
    q, k, v = _heads(x, weight)
    keys = k.new_empty(k.shape)
    keys[..., :1].copy_(k[..., :1])
    keys[..., 1:].copy_(k[..., 1:])
    return _scores(q, keys).softmax(-1) @ v


def keys_written_between_view_and_scores(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = _heads(x, weight)
    k = k.clone(memory_format=torch.contiguous_format)
    transposed = k.transpose(-2, -1)
    k.view(-1).mul_(3.0)
    return (q @ transposed).softmax(-1) @ v


def keys_copied_before_the_write(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = _heads(x, weight)
    k = k.clone(memory_format=torch.contiguous_format)
    transposed = k.transpose(-2, -1).contiguous()
    k.view(-1).mul_(3.0)
    return (q @ transposed).softmax(-1) @ v + k.sum()


def keys_written_behind_their_scores(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = _heads(x, weight)
    q, k = q.detach(), k.detach().clone(memory_format=torch.contiguous_format)
    scores = _scores(q, k)
    k.view(-1).mul_(3.0)
    return scores.softmax(-1) @ v + k.sum()


CASES: list[Callable[..., Tensor]] = [
    prefix_of_a_boolean_mask,
    prefix_of_an_added_mask,
    prefix_of_a_number_mask,
    complement_taken_before_the_write,
    conjunction_taken_before_the_write,
    heads_repeated_before_the_write,
    copy_made_by_a_reshape,
    keys_put_together_in_place,
    keys_written_between_view_and_scores,
    keys_copied_before_the_write,
    keys_written_behind_their_scores,
]


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_attention_sees_what_eager_saw(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    check(Functional(function, (8, 24)), torch.randn(2, 6, 8))


@pytest.mark.parametrize(
    "function, fused", [(keys_put_together_in_place, 1), (keys_written_behind_their_scores, 0)]
)
def test_keys_seen_as_a_view_are_read_when_the_scores_are(
    function: Callable[..., Tensor], fused: int
) -> None:
    regions = check(Functional(function, (8, 24)), torch.randn(2, 6, 8))
    assert sites(regions)["attention"] == fused, reasons(regions)


def _written_after_joining_nothing(x: Tensor) -> Tensor:
    longer = torch.cat([x.new_empty(0, 4), x])
    longer.view(-1).add_(1.0)
    return longer * 2


@pytest.mark.parametrize(
    "function",
    [_written_after_joining_nothing, lambda x: (x * 1.0).view(-1), lambda x: (x + 0.0).transpose(0, 1)],
)
def test_a_dropped_copy_never_hands_out_its_source(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    result, _ = capture(Functional(function), x)
    torch.testing.assert_close(result, function(before.clone()))
    assert torch.equal(x, before)
    assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
