"""Windows on both sides and global tokens of attention on the CPU: against a dense mask and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_checks import BEHIND, EVERYWHERE, arguments, assert_parity, tokens
from attention_checks import heads as heads_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusekit.kernels import attention, attention_blocked
from fusekit.kernels.attention import OP
from fusekit.kernels.attention_form import around, rows_of
from fusekit.kernels.op import DTYPES
from fusekit.kernels.parity import results_and_grads


def heads(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return heads_on("cpu", *sizes, dtype=dtype)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _flag(flags: Tensor | None, b: int, i: int) -> bool:
    return flags is not None and bool(rows_of(flags).expand(2, -1)[b, i])


def _dense(form: dict[str, Any], Tq: int, Tk: int) -> Tensor:
    """The form's band, global tokens and documents as a mask, written otherwise than the op's reference."""
    mask = torch.zeros(2, 1, Tq, Tk, dtype=torch.bool)
    for b in range(2):
        for i in range(Tq):
            for j in range(Tk):
                place = i + form["offset"]
                is_global = _flag(form["global_queries"], b, i) or _flag(form["global_keys"], b, j)
                sees = not form["causal"] or j <= place or (is_global and form["global_ahead"])
                sees &= form["window"] is None or j > place - form["window"] or is_global
                if form["documents"] is not None:
                    sees &= bool(form["documents"][b, i] == form["key_documents"][b, j])
                mask[b, 0, i, j] = sees
    return mask


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_a_form_is_its_dense_mask(data: Any) -> None:
    draw = data.draw
    Tq, Tk = draw(st.sampled_from([(9, 9), (7, 12), (1, 8), (11, 6)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    some = draw(st.booleans())

    def flags(T: int) -> Tensor | None:
        shape = draw(st.sampled_from([None, (T,), (1, T), (2, T)]))
        return None if shape is None else torch.rand(shape) < draw(st.sampled_from([0.1, 0.4, 1.0]))

    form = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 4])),
        "offset": draw(st.sampled_from([0, 3, -2])),
        "documents": torch.randint(0, 3, (2, Tq)) if some else None,
        "key_documents": torch.randint(0, 3, (2, Tk)) if some else None,
        "global_queries": flags(Tq),
        "global_keys": flags(Tk),
    }
    given = form["global_queries"] is not None or form["global_keys"] is not None
    form["global_ahead"] = given and draw(st.booleans())
    rest: dict[str, Any] = {"softcap": draw(st.sampled_from([None, 3.0]))}
    if draw(st.booleans()):
        rest |= {"dropout": 0.3, "seed": torch.tensor([3])}
    dense = _dense(form, Tq, Tk)
    if draw(st.booleans()):
        padding = torch.rand(2, 1, 1, Tk) < 0.7
        dense, form["mask"] = dense & padding, padding
    q, k, v = heads(2, Tq, 4, 8), heads(2, Tk, 2, 8), heads(2, Tk, 2, 8)
    before, attention_blocked.ROWS = attention_blocked.ROWS, 4
    try:
        ours = results_and_grads(OP.fused, arguments(q, k, v, **form, **rest))
    finally:
        attention_blocked.ROWS = before
    theirs = results_and_grads(OP.reference, arguments(q, k, v, mask=dense, **rest))
    told = results_and_grads(OP.reference, arguments(q, k, v, **form, **rest))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(told[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before, behind", [(20, 20), (0, 9), (40, 3)])
def test_a_window_on_both_sides(before, behind, dtype):
    q, k, v = heads(1, 300, 2, 32, dtype=dtype), *(heads(1, 300, 1, 32, dtype=dtype) for _ in range(2))
    assert_parity(arguments(q, k, v, **around(before, behind)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [EVERYWHERE, BEHIND], ids=["everywhere", "behind"])
def test_local_and_global_over_several_blocks(form, dtype):
    q, k, v = heads(2, 300, 2, 16, dtype=dtype), *(heads(2, 300, 1, 16, dtype=dtype) for _ in range(2))
    flags = torch.stack([tokens(300, 0, 1, 210), tokens(300, 299)])
    assert_parity(arguments(q, k, v, **form, global_queries=flags, global_keys=flags))


def test_the_gradient_of_a_bias_beside_global_tokens():
    q, k, v = (heads(2, 60, 2, 16) for _ in range(3))
    bias, sinks = torch.randn(1, 2, 60, 60).requires_grad_(), torch.randn(2).requires_grad_()
    flags = tokens(60, 2, 40)
    given = {"mask": bias, "sinks": sinks, "global_queries": flags, "global_keys": flags}
    assert_parity(arguments(q, k, v, **around(5, 5), **given))


def test_a_row_without_keys_is_zero_and_so_is_its_gradient():
    """Queries far behind the last key, of which one is global."""
    q, k, v = heads(1, 150, 2, 16), heads(1, 40, 2, 16), heads(1, 40, 2, 16)
    fused = assert_parity(arguments(q, k, v, **EVERYWHERE, global_queries=tokens(150, 120)))
    without = [*range(40 + 16, 120), *range(121, 150)]
    for name in ("output", "grad_0"):
        assert not fused[name][:, :, without].any()
        assert fused[name][:, :, 120].abs().max() > 0


@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one(T):
    q, k, v = (heads(2, T, 2, 16) for _ in range(3))
    flags = torch.ones(2, T, dtype=torch.bool)
    args = arguments(q, k, v, **EVERYWHERE, global_queries=flags, global_keys=flags)
    for name, result in results_and_grads(OP.fused, args).items():
        assert result.shape == (2, 2, T, 16) and result.isfinite().all(), name


def test_blocks_without_a_key_in_sight_are_skipped(monkeypatch):
    computed = []
    flash = attention_blocked.native._flash

    def record(q, k, *rest, **more):
        computed.append((q.shape[2], k.shape[2]))
        return flash(q, k, *rest, **more)

    monkeypatch.setattr(attention_blocked.native, "_flash", record)
    q, k, v = (heads(1, 512, 1, 8) for _ in range(3))
    flags = tokens(512, 0, 300)
    OP.fused(*arguments(q, k, v, **EVERYWHERE, global_queries=flags, global_keys=flags))
    # 128 queries and 16 keys beside them, and the global keys elsewhere; the two global queries see all.
    assert computed == [(127, 145), (128, 162), (127, 161), (128, 146), (2, 512)]


def test_global_tokens_change_nothing_where_nothing_is_hidden():
    q, k, v = (heads(1, 40, 2, 8) for _ in range(3))
    flags = tokens(40, 3)
    for form in ({}, {"causal": True}):
        given = arguments(q, k, v, **form, global_queries=flags, global_keys=flags)
        torch.testing.assert_close(OP.fused(*given), OP.fused(*arguments(q, k, v, **form)), rtol=0, atol=0)
        assert "global" not in attention.runs_on(*given)


def test_who_runs_it():
    q, k, v = (heads(1, 40, 2, 8) for _ in range(3))
    form = {**EVERYWHERE, "global_keys": tokens(40, 3)}
    assert attention.runs_on(*arguments(q, k, v, **form)) == "CPU blocks: global tokens beside a window"
    assert "of key blocks skipped" not in attention.runs_on(*arguments(q, k, v, **around(30, 30)))
    q, k, v = (heads(1, 1024, 2, 8) for _ in range(3))
    assert attention.runs_on(*arguments(q, k, v, **around(16, 16))) == (
        "CPU blocks: window, 85% of key blocks skipped"
    )


def test_opcheck():
    q, k, v = (heads(2, 10, 4, 8) for _ in range(3))
    flags = torch.stack([tokens(10, 0), tokens(10, 4)])
    args = arguments(q, k, v, **around(2, 2), global_queries=flags, global_keys=flags, global_ahead=True)
    torch.library.opcheck(OP.fused, args)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"global_keys": torch.zeros(6)}, "global_keys are bool, not float32"),
        ({"global_keys": torch.zeros(6, dtype=torch.int64)}, "global_keys are bool, not int64"),
        ({"global_keys": tokens(5)}, r"global_keys \(5,\) are neither \(6,\) nor \(2, 6\)"),
        ({"global_queries": tokens(6)}, r"global_queries \(6,\) are neither \(5,\) nor \(2, 5\)"),
        ({"global_queries": torch.zeros(3, 5, dtype=torch.bool)}, r"global_queries \(3, 5\) are neither"),
        ({"global_ahead": True}, "says how far global tokens reach, and there are none"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence(change, sentence):
    q, k, v = heads(2, 5, 4, 8), heads(2, 6, 4, 8), heads(2, 6, 4, 8)
    with pytest.raises(ValueError, match=sentence):
        OP.fused(*arguments(q, k, v, window=3, **change))
