"""Documents in models: packed sequences, chunks, both at once; pairs of booleans written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Functional, calls, capture, check, reasons
from test_rules_alibi import IDS, QKV, attentions
from torch import Tensor, nn

import fusekit
from fusekit.passes import price
from fusekit.session import session

PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]]).expand(2, -1)


def llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_chunk_size=4, num_local_experts=2,
        use_cache=False, moe_layers=[], pad_token_id=0,
    )  # fmt: skip
    return Llama4ForCausalLM(config)


def test_chunks() -> None:
    _, regions = capture(llama4(), IDS)
    found = attentions(regions)
    assert found and any(given["documents"] is not None for given in found), reasons(regions)
    assert all(given["causal"] and given["mask"] is None for given in found)


@pytest.mark.parametrize("dynamic", [None, True])
def test_chunks_of_packed_sequences(dynamic: bool | None) -> None:
    """Two comparisons in a mask, both the op's documents; their numbers are sorted once for all layers."""
    regions = check(llama4(), IDS, position_ids=PACKED, dynamic=dynamic, tolerance=1e-4)
    found = attentions(regions)
    assert len(found) == 4, reasons(regions)
    for given in found:
        assert given["documents"] is not None and given["causal"] and given["mask"] is None
    assert calls(regions, "sort") == 2


def _valid(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries and keys that are both there, as many a hand-written encoder."""
    there = x > 0
    mask = there[:, None, :, None] & there[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, mask) * there[:, None, :, None]


def _segments(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Packed by hand: segments, of which 0 is padding."""
    mask = (x[:, :, None] == x[:, None, :]) & (x > 0)[:, :, None] & (x > 0)[:, None, :]
    return F.scaled_dot_product_attention(q, k, v, mask[:, None])


SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0], [3, 3, 1, 1, 0, 0]])


@pytest.mark.parametrize("attend", [_valid, _segments])
def test_what_is_padded_on_both_sides(attend: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    regions = check(Functional(attend, *QKV), SEGMENTS)
    (given,) = attentions(regions)
    assert given["documents"] is not None and given["key_documents"] is not None
    dense = given["mask"] is not None and given["mask"].meta["val"].shape[-2] > 1
    assert not dense


def test_sites_that_are_put_back_share_their_masks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price, "LEAST_GAIN", 1e9)
    expected = llama4()(IDS, position_ids=PACKED).logits
    model = fusekit.optimize(llama4())
    torch.testing.assert_close(model(IDS, position_ids=PACKED).logits, expected)
    report = fusekit.explain(model)
    assert not report.fused and not report.notes
    regions = [captured.region for captured in session(model).regions]
    alone = fusekit.optimize(llama4(), fuse="none")
    alone(IDS, position_ids=PACKED)
    as_it_was = [captured.region for captured in session(alone).regions]
    assert calls(regions, "cumsum") <= calls(as_it_was, "cumsum")  # not once a layer
    assert not calls(regions, "sort") and not calls(regions, "searchsorted")  # made for the op alone
