"""ALiBi and documents of attention on the CPU: against a dense mask, against float64, what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from attention_checks import arguments, assert_parity
from attention_checks import heads as heads_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusekit.kernels import attention_blocked
from fusekit.kernels.attention import OP
from fusekit.kernels.attention_documents import document_ids
from fusekit.kernels.parity import results_and_grads

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def heads(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return heads_on("cpu", *sizes, dtype=dtype)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _dense(form: dict[str, Any], Tq: int, Tk: int) -> Tensor:
    """The form's bias, documents and band as one additive mask, written otherwise than the op's reference."""
    mask = torch.zeros(2, 4, Tq, Tk)
    for b in range(2):
        for i in range(Tq):
            for j in range(Tk):
                place = i + form["offset"]
                hidden = form["causal"] and j > place
                hidden |= form["window"] is not None and j <= place - form["window"]
                if form["documents"] is not None:
                    hidden |= bool(form["documents"][b, i] != form["key_documents"][b, j])
                where = j - place if form["places"] is None else int(form["places"][b, j])
                mask[b, :, i, j] = -math.inf if hidden else where * form["slopes"]
    return mask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_a_form_is_its_dense_mask(data: Any) -> None:
    draw = data.draw
    Tq, Tk = draw(st.sampled_from([(9, 9), (7, 12), (1, 8), (11, 6)]))
    torch.manual_seed(draw(st.integers(0, 9)))
    some = draw(st.booleans())
    sort = draw(st.booleans())
    ids, key_ids = (torch.randint(0, 3, (2, T)) for T in (Tq, Tk))
    form = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 4])),
        "offset": draw(st.sampled_from([0, 3, -2])),
        "slopes": SLOPES,
        "places": torch.randint(0, 9, (2, Tk)) if draw(st.booleans()) else None,
        "documents": (ids.sort(-1).values if sort else ids) if some else None,
        "key_documents": (key_ids.sort(-1).values if sort else key_ids) if some else None,
    }
    rest = {"softcap": draw(st.sampled_from([None, 3.0]))}
    q, k, v = heads(2, Tq, 4, 8), heads(2, Tk, 2, 8), heads(2, Tk, 2, 8)
    before, attention_blocked.ROWS = attention_blocked.ROWS, 4
    try:
        ours = results_and_grads(OP.fused, arguments(q, k, v, **form, **rest))
    finally:
        attention_blocked.ROWS = before
    theirs = results_and_grads(OP.reference, arguments(q, k, v, mask=_dense(form, Tq, Tk), **rest))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    told = results_and_grads(OP.reference, arguments(q, k, v, **form, **rest))
    for name in theirs:
        torch.testing.assert_close(told[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_documents_longer_than_a_block_and_alibi_against_float64(dtype):
    q, k, v = heads(2, 300, 4, 16, dtype=dtype), *(heads(2, 300, 2, 16, dtype=dtype) for _ in range(2))
    ids = document_ids(torch.tensor([0, 130, 130, 295]), 300)
    assert_parity(arguments(q, k, v, causal=True, documents=ids, slopes=SLOPES))


def test_blocks_of_other_documents_are_skipped(monkeypatch):
    computed = []
    flash = attention_blocked.native._flash

    def record(q, k, *rest, **more):
        computed.append((len(q), q.shape[2], k.shape[2]))
        return flash(q, k, *rest, **more)

    monkeypatch.setattr(attention_blocked.native, "_flash", record)
    q, k, v = (heads(2, 512, 1, 8) for _ in range(3))
    ids = torch.stack([torch.arange(512) // 128, torch.arange(512) // 256])
    OP.fused(*arguments(q, k, v, causal=True, documents=ids))
    assert computed == [(1, 128, 128)] * 4 + [(1, 128, 128), (1, 128, 256)] * 2


def test_ids_of_cumulative_lengths():
    assert document_ids(torch.tensor([0, 2, 2, 5]), 7).tolist() == [1, 1, 3, 3, 3, 4, 4]
    assert document_ids(torch.tensor([1, 3], dtype=torch.int32), 4).tolist() == [0, 1, 1, 2]
    with pytest.raises(ValueError, match=r"pass the cumulative lengths"):
        document_ids(torch.tensor([[0.0, 2.0]]), 2)


def test_packed_documents_are_each_by_itself():
    q, k, v = (heads(1, 40, 2, 8) for _ in range(3))
    ends = [0, 11, 12, 40]
    ids = document_ids(torch.tensor(ends), 40)
    packed = OP.fused(*arguments(q, k, v, causal=True, documents=ids, slopes=SLOPES[:2]))
    for start, end in itertools.pairwise(ends):
        alone = (x[:, :, start:end] for x in (q, k, v))
        expected = OP.fused(*arguments(*alone, causal=True, slopes=SLOPES[:2]))
        torch.testing.assert_close(packed[:, :, start:end], expected)


def test_autocast_leaves_slopes_and_places():
    q, k, v = (heads(1, 300, 2, 8) for _ in range(3))
    slopes, places = torch.tensor([0.3, 0.7]), torch.arange(300.0)
    with torch.autocast("cpu", torch.bfloat16):
        fused = OP.fused(*arguments(q, k, v, causal=True, slopes=slopes, places=places))
    low = (x.detach().bfloat16() for x in (q, k, v))
    exact = OP.reference(*arguments(*low, causal=True, slopes=slopes))
    torch.testing.assert_close(fused, exact, rtol=2e-2, atol=2e-2)


def test_opcheck():
    q, k, v = (heads(2, 10, 4, 8) for _ in range(3))
    ids = torch.tensor([[0] * 4 + [1] * 6, [0] * 10])
    args = arguments(q, k, v, causal=True, slopes=SLOPES, places=torch.arange(10), documents=ids)
    torch.library.opcheck(OP.fused, args)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"slopes": SLOPES[:3]}, r"slopes \(3,\) of float32: one floating number for each of 4 heads"),
        ({"slopes": SLOPES.clone().requires_grad_()}, "slopes have no gradient: detach them"),
        ({"slopes": torch.ones(4, dtype=torch.int64)}, "of int64: one floating number"),
        ({"places": torch.arange(6)}, "multiplied by slopes, and there are none"),
        ({"slopes": SLOPES, "places": torch.arange(5)}, r"places \(5,\) are neither \(6,\) nor \(2, 6\)"),
        ({"slopes": SLOPES, "places": torch.arange(6).half()}, "int32 or int64 or float32, not float16"),
        ({"documents": torch.zeros(2, 5)}, "documents are int32 or int64, not float32"),
        ({"documents": torch.zeros(3, 5).long()}, r"documents \(3, 5\) are neither"),
        ({"documents": torch.zeros(5).long()}, "6 keys for 5 queries: say of which documents they are"),
        ({"key_documents": torch.zeros(6).long()}, "compared with documents, and there are none"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence(change, sentence):
    q, k, v = heads(2, 5, 4, 8), heads(2, 6, 4, 8), heads(2, 6, 4, 8)
    if "documents" in change and "say of" not in sentence:
        change = {**change, "key_documents": torch.zeros(6).long()}
    with pytest.raises(ValueError, match=sentence):
        OP.fused(*arguments(q, k, v, **change))
