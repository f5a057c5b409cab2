"""The decoding kernels, on a GPU or in the sanitizer: parts of the keys joined, against float64."""

from __future__ import annotations

import functools

import attention_checks
import pytest
import torch
from attention_checks import assert_parity

from fusekit.kernels import attention_decode
from fusekit.kernels.attention import OP
from fusekit.kernels.op import DTYPES
from fusekit.kernels.parity import deterministic

FAR = (None, True, None, 0.0, None, 0, False)  # mask to tf32, in front of window, offset, softcap and sinks


heads = functools.partial(attention_checks.heads, "cuda")


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """Parts of every call of the decoding kernels."""
    calls = []
    forward = attention_decode.forward

    def counted(q, k, v, form, tail):
        calls.append(attention_decode.split(q, k, v, form).parts)
        return forward(q, k, v, form, tail)

    monkeypatch.setattr(attention_decode, "forward", counted)
    return calls


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_of_grouped_heads(dtype, taken):
    args = (heads(2, 1, 6, 40, dtype), heads(2, 200, 2, 40, dtype), heads(2, 200, 2, 40, dtype))
    assert_parity(args)
    assert taken and taken[0] > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_ordinary_kernels_output_and_stats(dtype, taken, monkeypatch):
    """So that its backward kernels follow: the same results, to their rounding."""
    q, k, v = heads(1, 3, 4, 64, dtype), heads(1, 150, 2, 64, dtype), heads(1, 150, 2, 64, dtype)
    for mask in (None, torch.randn(4, 3, 150).to("cuda", dtype)):
        args = (q, k, v, 1, mask, False, 0.125, 0.0, None, 0, False, None, 0, *[None] * 8, False, True)
        split = torch.ops.fusekit.attention_forward(*args)
        with monkeypatch.context() as patch:
            patch.setattr(attention_decode, "takes", lambda *args: False)
            whole = torch.ops.fusekit.attention_forward(*args)
        for ours, theirs in zip(split, whole, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert ours.stride() == theirs.stride()
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(split[0], whole[0], **tolerance)
        torch.testing.assert_close(split[1], whole[1], **tolerance)  # log2 sums; largest scores beside a bias
    assert len(taken) == 2


def test_padding_of_a_batch_and_a_row_without_keys(taken):
    q, k, v = heads(3, 1, 4, 32), heads(3, 170, 1, 32), heads(3, 170, 1, 32)
    padding = (torch.arange(170) >= torch.tensor([0, 155, 170])[:, None])[:, None, None, :].to("cuda")
    fused = assert_parity((q, k, v, padding))
    assert torch.equal(fused["output"][2], torch.zeros(4, 1, 32).to("cuda"))
    assert all(torch.equal(fused[f"grad_{i}"][2], torch.zeros_like(fused[f"grad_{i}"][2])) for i in range(3))
    assert taken[0] > 2  # parts of which some hold padding alone


def test_additive_mask_of_each_head_and_rows_of_finfo_min(taken):
    q, k, v = heads(1, 2, 4, 16), heads(1, 140, 2, 16), heads(1, 140, 2, 16)
    mask = torch.randn(1, 4, 2, 140).to("cuda")
    mask[:, 1] = torch.finfo(torch.float32).min
    mask[:, 2, 1] = float("-inf")
    mask[:, 3, :, 70:] = float("-inf")
    fused = assert_parity((q, k, v, mask.requires_grad_()))
    torch.testing.assert_close(fused["output"][0, 1, 0], v.detach()[0, 0].mean(0))
    assert torch.equal(fused["output"][0, 2, 1], torch.zeros(16).to("cuda"))
    assert taken


@pytest.mark.parametrize(
    "dtype, Tq, window",
    [
        (torch.float32, 5, None),
        (torch.float32, 7, 131),
        (torch.float16, 1, None),
        (torch.float16, 1, 130),
        (torch.float16, 7, 131),
    ],
)
def test_bands_of_a_cache(dtype, Tq, window, taken):
    """The last query stands beside the last key; a window's parts hold no key that nobody sees.

    In float32 with several queries: all of one row's P share the rounding of its sum, here as in the ordinary
    kernel, and the criterion takes the shared error of two rows for a bias.
    """
    Tk = 333
    q, k, v = heads(1, Tq, 4, 32, dtype), heads(1, Tk, 1, 32, dtype), heads(1, Tk, 1, 32, dtype)
    assert_parity((q, k, v, *FAR, window, Tk - Tq))
    block = 16 if dtype == torch.float32 else 64
    first = 0 if window is None else (Tk - Tq - window + 1) // block * block
    assert taken[0] >= 3 and taken[0] <= -(-(Tk - first) // block)


def test_capped_scores_with_padding(taken):
    q, k, v = heads(2, 1, 4, 32), heads(2, 150, 2, 32), heads(2, 150, 2, 32)
    padding = (torch.arange(150) >= torch.tensor([0, 70])[:, None])[:, None, None, :].to("cuda")
    for softcap in (0.5, 50.0):
        assert_parity((q, k, v, padding, False, *FAR[2:], None, 0, softcap))
    assert len(taken) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_and_their_gradient(dtype, taken):
    q, k, v = heads(2, 1, 4, 16, dtype), heads(2, 150, 2, 16, dtype), heads(2, 150, 2, 16, dtype)
    sinks = torch.tensor([0.5, -2.0, 3.0, float("-inf")]).to("cuda", dtype).requires_grad_()
    padding = (torch.arange(150) >= torch.tensor([0, 150])[:, None])[:, None, None, :].to("cuda")
    assert_parity((q, k, v, padding, False, *FAR[2:], None, 0, None, sinks))
    assert taken


def test_more_rows_than_a_tile_and_a_wider_value(taken):
    """12 heads of 11 queries share a key head: rows of five tiles; strides of a packed cache."""
    cache = torch.randn(2, 140, 2, 48).to("cuda", torch.bfloat16)
    q = heads(1, 11, 12, 24, torch.bfloat16)
    k = cache[:1, :, :1, :24].transpose(1, 2).detach().requires_grad_()
    v = cache[1:, :, 1:].transpose(1, 2).detach().requires_grad_()
    assert_parity((q, k, v, *FAR, None, 129))
    assert taken


def test_heads_of_256_features(taken):
    q, k, v = (heads(1, T, 2, 256, torch.bfloat16) for T in (1, 130, 130))
    assert_parity((q, k, v))
    assert taken == [5]


def test_runs_are_bitwise_equal(taken):
    q, k, v = heads(1, 1, 4, 40, torch.bfloat16), *(heads(1, 300, 1, 40, torch.bfloat16) for _ in range(2))
    assert deterministic(OP.fused, (q, k, v), runs=2)
    assert taken[0] > 1


def test_what_the_ordinary_kernel_keeps(taken):
    """More queries, few keys, keys that a window hides, dropout, wide float32 heads, nothing to compute."""
    seed = torch.tensor([5]).to("cuda")
    for Tq, Tk, D, rest in (
        (17, 150, 16, ()),
        (1, 127, 16, ()),
        (1, 300, 16, (*FAR, 100, 299)),
        (1, 150, 16, (None, False, None, 0.25, seed, 3)),
        (2, 130, 160, ()),
        (0, 150, 16, ()),
    ):
        args = (heads(1, Tq, 2, D), heads(1, Tk, 1, D), heads(1, Tk, 1, D), *rest)
        torch.testing.assert_close(OP.fused(*args), OP.reference(*args), rtol=1e-4, atol=1e-5)
    assert not taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_alibi_of_a_cache(dtype, queries, taken):
    """MPT: slopes of heads that share keys, the last query beside the last key."""
    q, k, v = heads(2, queries, 4, 32, dtype), heads(2, 150, 2, 32, dtype), heads(2, 150, 2, 32, dtype)
    slopes = (2.0 ** -torch.arange(1.0, 5.0)).to("cuda")
    plain = (None, True, *FAR[2:], None, 150 - queries, None, None)
    assert_parity((q, k, v, *plain, slopes))
    assert taken and taken[0] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_alibi_of_padded_sequences(dtype, taken):
    """Bloom: slopes of each sequence times the places of its keys, which are data; a row without keys.

    Gentle slopes: a bias of 100 costs float32 scores its digits, in the ordinary kernel as here.
    """
    q, k, v = (heads(3, T, 3, 32, dtype) for T in (1, 140, 140))
    padding = torch.arange(140) >= torch.tensor([0, 100, 140])[:, None]
    places = ((padding.long().cumsum(-1) - 1) * padding).to("cuda")
    slopes = torch.tensor([[0.1, 0.05, 0.03], [0.2, 0.1, 0.05], [1.0, 2.0, 3.0]]).to("cuda")
    args = (padding[:, None, None].to("cuda"), False, *FAR[2:], None, 0, None, None, slopes, places)
    fused = assert_parity((q, k, v, *args))
    assert torch.equal(fused["output"][2], torch.zeros(3, 1, 32).to("cuda"))
    assert taken


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_documents_of_a_cache(ids, taken):
    """Numbers in any order, of one sequence or of each, beside a window; a query without keys."""
    q, k, v = heads(2, 2, 4, 32), heads(2, 150, 1, 32), heads(2, 150, 1, 32)
    theirs = torch.stack([torch.arange(150) // 60, 7 - torch.arange(150) // 40]).to("cuda", ids)
    ours = torch.tensor([[1, 2], [4, 9]]).to("cuda", ids)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0]).to("cuda")
    for rest in (
        (None, False, *FAR[2:], None, 0, None, None, None, None, ours, theirs),
        (None, True, *FAR[2:], 140, 148, None, None, None, None, ours, theirs),
        (None, False, *FAR[2:], None, 0, None, None, None, None, ours[0], theirs[0]),
    ):
        assert_parity((q, k, v, *rest))
    assert len(taken) == 3
    for softcap, given in ((20.0, None), (None, slopes)):  # more than registers hold: the ordinary kernel
        assert_parity((q, k, v, None, True, *FAR[2:], None, 148, softcap, None, given, None, ours, theirs))
    assert len(taken) == 3


def test_a_group_that_leaves_rows_of_a_tile_empty_reads_no_slope_of_theirs(taken):
    """3 heads share a key head: of 16 rows 3 exist, and the slopes end with theirs."""
    q, k, v = heads(1, 1, 3, 16), heads(1, 130, 1, 16), heads(1, 130, 1, 16)
    slopes = torch.tensor([0.5, 0.25, 0.125]).to("cuda")
    assert_parity((q, k, v, *FAR, None, 129, None, None, slopes))
    assert taken
