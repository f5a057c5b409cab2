"""ALiBi and documents in the attention kernels, on a GPU or in the sanitizer, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_checks import arguments, assert_parity
from attention_checks import heads as heads_on
from torch import Tensor

from fusekit.kernels.attention import OP
from fusekit.kernels.attention_documents import document_ids, ranges
from fusekit.kernels.parity import deterministic

SLOPES = [0.5, 0.25, 0.125, 0.0625]


def heads(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return heads_on("cuda", *sizes, dtype=dtype)


def on_gpu(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype).to("cuda")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_alibi_of_each_head(dtype):
    q, k, v = heads(1, 140, 4, 32, dtype=dtype), *(heads(1, 150, 2, 32, dtype=dtype) for _ in range(2))
    assert_parity(arguments(q, k, v, causal=True, offset=10, slopes=on_gpu(SLOPES)))


@pytest.mark.parametrize("window, softcap", [(None, None), (20, 3.0)])
def test_alibi_of_each_batch_element_beside_sinks_and_a_cap(window, softcap):
    q, k, v = (heads(2, 40, 2, 16) for _ in range(3))
    slopes = on_gpu([[0.5, 0.1], [0.0, -0.3]])
    sinks = torch.randn(2).to("cuda").requires_grad_()
    form = {"window": window, "softcap": softcap, "sinks": sinks, "offset": 3}
    assert_parity(arguments(q, k, v, slopes=slopes, **form))


def test_alibi_with_places_beside_padding_and_a_bias_with_gradient():
    q, k, v = (heads(2, 50, 4, 16, dtype=torch.bfloat16) for _ in range(3))
    padding = torch.arange(50) >= torch.tensor([0, 20])[:, None]
    places = ((padding.long().cumsum(-1) - 1) * padding).to("cuda", torch.float32)
    mask = torch.where(padding, 0.0, torch.finfo(torch.float32).min)[:, None, None].to("cuda")
    assert_parity(arguments(q, k, v, mask=mask, causal=True, slopes=on_gpu(SLOPES), places=places))
    bias = torch.randn(4, 50, 50).to("cuda", torch.bfloat16).requires_grad_()
    assert_parity(arguments(q, k, v, mask=bias, causal=True, slopes=on_gpu(SLOPES), places=places[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 30)])
def test_documents_one_after_the_other(causal, window, dtype):
    q, k, v = heads(2, 150, 2, 16, dtype=dtype), *(heads(2, 150, 1, 16, dtype=dtype) for _ in range(2))
    ids = torch.stack(
        [document_ids(torch.tensor(ends), 150) for ends in ([0, 70, 75, 150], [0, 10, 140, 140])]
    )
    form = {"causal": causal, "window": window, "documents": ids.to("cuda")}
    assert_parity(arguments(q, k, v, **form))
    assert deterministic(OP.fused, arguments(q, k, v, **form), runs=2)


def test_documents_in_no_order_and_queries_of_none():
    q, k, v = heads(2, 70, 2, 16), heads(2, 90, 2, 16), heads(2, 90, 2, 16)
    ids, key_ids = torch.randint(-3, 4, (2, 70)), torch.randint(-3, 4, (90,))
    ids[ids == 2] = -(1 << 40)  # no key is of this document; cut to 32 bits it would be 0
    ids[:, 5] = 1 << 40
    fused = assert_parity(arguments(q, k, v, documents=ids.to("cuda"), key_documents=key_ids.to("cuda")))
    for name in ("output", "grad_0"):
        assert torch.equal(fused[name][:, :, 5], torch.zeros(2, 2, 16).to("cuda"))


def test_documents_beside_everything_else():
    q, k, v = (heads(2, 60, 2, 16) for _ in range(3))
    ids = document_ids(torch.tensor([0, 25, 60]), 60).to("cuda")
    bias = torch.randn(1, 2, 60, 60).to("cuda").requires_grad_()
    seed, slopes = torch.tensor([5]).to("cuda"), on_gpu([0.5, 0.25])
    form = {"mask": bias, "dropout": 0.3, "seed": seed, "softcap": 4.0, "slopes": slopes}
    assert_parity(arguments(q, k, v, causal=True, documents=ids, **form))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ranges_hold_every_key_of_a_block_and_no_whole_document_more(dtype):
    sorted_ids = torch.tensor([0] * 700 + [1] * 5 + [3] * 800 + [9] * 20)
    shuffled = torch.randint(0, 900, (1525,))
    ours = torch.stack([sorted_ids, shuffled]).to(dtype)
    theirs = torch.stack([sorted_ids, shuffled.roll(7)]).to(dtype)
    found = ranges(ours.to("cuda"), theirs.to("cuda"), 64).cpu()
    for b in range(2):
        for block, ids in enumerate(ours[b].split(64)):
            near = ((theirs[b] >= ids.min()) & (theirs[b] <= ids.max())).nonzero()
            assert found[b, block].tolist() == [int(near[0]), int(near[-1]) + 1]


def test_ranges_of_a_block_without_a_partner_are_empty():
    first, last = ranges(on_gpu([[5, 5]]), on_gpu([[1, 9, 1]]), 16).cpu()[0, 0].tolist()
    assert first >= last
