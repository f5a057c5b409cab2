"""Windows on both sides and global tokens in the attention kernels, on a GPU or in the sanitizer."""

from __future__ import annotations

import pytest
import torch
from attention_checks import BEHIND, EVERYWHERE, arguments, assert_parity, tokens
from attention_checks import heads as heads_on
from torch import Tensor

from fusekit.kernels.attention import OP
from fusekit.kernels.attention_documents import document_ids
from fusekit.kernels.attention_form import around
from fusekit.kernels.attention_globals import global_blocks
from fusekit.kernels.op import DTYPES, LOW_PRECISION
from fusekit.kernels.parity import deterministic, results_and_grads


def heads(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return heads_on("cuda", *sizes, dtype=dtype)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before, behind", [(20, 20), (0, 9), (40, 3)])
def test_a_window_on_both_sides(before, behind, dtype):
    q, k, v = heads(1, 200, 2, 32, dtype=dtype), *(heads(1, 200, 1, 32, dtype=dtype) for _ in range(2))
    assert_parity(arguments(q, k, v, **around(before, behind)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [EVERYWHERE, BEHIND], ids=["everywhere", "behind"])
def test_local_and_global(form, dtype):
    q, k, v = heads(2, 300, 2, 16, dtype=dtype), *(heads(2, 300, 1, 16, dtype=dtype) for _ in range(2))
    flags = torch.stack([tokens(300, 0, 1, 210), tokens(300, 299)]).to("cuda")
    args = arguments(q, k, v, **form, global_queries=flags, global_keys=flags)
    assert_parity(args)
    assert deterministic(OP.fused, args, runs=2)


@pytest.mark.parametrize("form", [EVERYWHERE, BEHIND, {"causal": True, "global_ahead": True}])
@pytest.mark.parametrize("side", ["global_queries", "global_keys"])
def test_global_on_one_side_over_lengths_that_differ(form, side):
    q, k, v = heads(1, 150, 2, 16), heads(1, 230, 2, 16), heads(1, 230, 2, 16)
    T = 150 if side == "global_queries" else 230
    form = form | {"offset": form.get("offset", 0) + 80}
    assert_parity(arguments(q, k, v, **form, **{side: tokens(T, 3, 100, 101, 149).to("cuda")}))


@pytest.mark.parametrize("form", [EVERYWHERE, BEHIND], ids=["everywhere", "behind"])
def test_global_beside_padding_and_documents(form):
    q, k, v = (heads(2, 180, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    flags = torch.stack([tokens(180, 0, 90), tokens(180)]).to("cuda")
    form = form | {"global_queries": flags, "global_keys": flags}
    padding = (torch.arange(180) < torch.tensor([180, 100])[:, None])[:, None, None].to("cuda")
    assert_parity(arguments(q, k, v, mask=padding, **form))
    ids = torch.stack([document_ids(torch.tensor([0, 85, 180]), 180), torch.arange(180) % 3]).to("cuda")
    assert_parity(arguments(q, k, v, documents=ids, **form))
    assert_parity(arguments(q, k, v, documents=ids, mask=padding, **form))


def test_global_beside_everything_else():
    q, k, v = (heads(2, 60, 2, 16) for _ in range(3))
    ids = document_ids(torch.tensor([0, 25, 60]), 60).to("cuda")
    bias = torch.randn(1, 2, 60, 60).to("cuda").requires_grad_()
    seed, slopes = torch.tensor([5]).to("cuda"), torch.tensor([0.5, 0.25]).to("cuda")
    given = {"mask": bias, "dropout": 0.3, "seed": seed, "slopes": slopes, "documents": ids}
    given |= dict.fromkeys(("global_queries", "global_keys"), tokens(60, 2, 40).to("cuda"))
    assert_parity(arguments(q, k, v, **around(5, 5), **given))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_global_beside_sinks_and_a_cap(dtype):
    q, k, v = heads(2, 130, 2, 32, dtype=dtype), *(heads(2, 130, 1, 32, dtype=dtype) for _ in range(2))
    sinks = torch.randn(2).to("cuda", dtype).requires_grad_()
    flags = tokens(130, 2, 90).to("cuda")
    form = EVERYWHERE | {"sinks": sinks, "global_queries": flags, "global_keys": flags}
    assert_parity(arguments(q, k, v, **form))
    assert_parity(arguments(q, k, v, softcap=20.0, **form))


def test_a_row_without_keys_is_zero_and_so_is_its_gradient():
    """Queries far behind the last key, of which one is global."""
    q, k, v = heads(1, 150, 2, 16), heads(1, 40, 2, 16), heads(1, 40, 2, 16)
    fused = assert_parity(arguments(q, k, v, **EVERYWHERE, global_queries=tokens(150, 120).to("cuda")))
    without = [*range(40 + 16, 120), *range(121, 150)]
    for name in ("output", "grad_0"):
        assert not fused[name][:, :, without].any()
        assert fused[name][:, :, 120].abs().max() > 0


@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one(T):
    q, k, v = (heads(2, T, 2, 16) for _ in range(3))
    flags = torch.ones(2, T, dtype=torch.bool).to("cuda")
    args = arguments(q, k, v, **EVERYWHERE, global_queries=flags, global_keys=flags)
    fused = results_and_grads(OP.fused, args)
    for name, expected in results_and_grads(OP.reference, args).items():
        torch.testing.assert_close(fused[name], expected)


@pytest.mark.parametrize("T, block", [(1, 16), (300, 32), (300, 128), (5000, 16), (4500, 64)])
def test_blocks_that_hold_a_global_token(T, block):
    flags = torch.stack([torch.rand(T) < 0.02, torch.zeros(T, dtype=torch.bool)])
    found = global_blocks(flags.view(torch.uint8).to("cuda"), block).cpu()
    for b in range(2):
        holds = [bool(part.any()) for part in flags[b].split(block)]
        numbers = [i for i, held in enumerate(holds) if held]
        blocks = len(holds)
        assert found[b, : blocks + 1].tolist() == [sum(holds[:i]) for i in range(blocks + 1)]
        assert found[b, blocks + 1 :][: len(numbers)].tolist() == numbers
