"""What attention keeps of its output beyond 16 bits, and the gradients that need it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_checks import arguments, heads
from library_checks import exact
from torch import Tensor

from fusekit.kernels import attention_decode, attention_tail
from fusekit.kernels.attention import OP, reference
from fusekit.kernels.attention_choice import forced
from fusekit.kernels.attention_libraries import Library
from fusekit.kernels.op import DTYPES, LOW_PRECISION
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen

STEP = {torch.bfloat16: 8, torch.float16: 5}


def alike(T: int, dtype: torch.dtype, queries: int | None = None, D: int = 32) -> tuple[Tensor, ...]:
    """q, k, v with scores that are alike, and keys and values that have a part in common."""
    torch.manual_seed(0)
    made = (
        torch.randn(1, queries or T, 2, D) * 0.05,
        torch.randn(1, T, 2, D) * 0.05 + 0.5,
        torch.randn(1, T, 2, D) * 0.3 + 0.5,
    )
    return tuple(x.to("cuda", dtype).transpose(1, 2).requires_grad_() for x in made)


def kept(q: Tensor, k: Tensor, v: Tensor, tail: int, **form: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out, stats and the tail."""
    q, k, v, *settings = arguments(q.detach(), k.detach(), v.detach(), **form)
    settings[2] = q.shape[-1] ** -0.5
    return torch.ops.fusekit.attention_forward(q, k, v, tail, *settings)


def rejoined(out: Tensor, tail: Tensor) -> Tensor:
    """(B, H, Tq, DV) in float32."""
    bits = out.float().contiguous().view(torch.int32)
    return (bits + (tail.transpose(1, 2).to(torch.int32) << STEP[out.dtype])).view(torch.float32)


def as_models_write_it(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def of_dq(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """dq in float64, and what rounding it would lose."""
    truth = results_and_grads(OP.reference, widen(args))["grad_0"]
    return truth, (truth.to(args[0].dtype).double() - truth).norm()


def assert_as_close_as_products_are(args: tuple[Any, ...]) -> dict[str, Tensor]:
    """As every op; dq, whose products take dS rounded to 16 bits and add up to little, within 16 floors."""
    wide, eager, fused = (
        results_and_grads(function, given)
        for function, given in ((OP.reference, widen(args)), (OP.reference, args), (OP.fused, args))
    )
    truth, floor = of_dq(args)
    assert (fused["grad_0"].double() - truth).norm() < 16 * floor
    others = [{name: t for name, t in x.items() if name != "grad_0"} for x in (fused, eager, wide)]
    verdicts = check(*others, dtype=args[0].dtype, terms=longest_sum(args[:4]), inherent=True)
    assert all(v.ok for v in verdicts), verdicts
    return fused


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("form", ["full", "causal", "window", "bias", "dropout", "slopes", "capped", "sinks"])
def test_gradients_where_scores_are_alike_do_not_show_that_the_output_was_rounded(dtype, form, monkeypatch):
    """dq was more than 100 floors off."""
    q, k, v = alike(150, dtype)
    given = {
        "full": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": 90},
        "bias": {"mask": (torch.randn(2, 150, 150) * 0.01).to("cuda", dtype).requires_grad_()},
        "dropout": {"dropout": 0.1, "seed": torch.tensor(5).to("cuda")},
        "slopes": {"slopes": torch.full((2,), 1e-4).to("cuda")},
        "capped": {"softcap": 30.0},
        "sinks": {"sinks": torch.zeros(2).to("cuda", dtype).requires_grad_()},
    }[form]
    args = arguments(q, k, v, **given)
    results = assert_as_close_as_products_are(args)
    if form in ("full", "causal"):
        truth, floor = of_dq(args)
        eager = results_and_grads(as_models_write_it, (q, k, v, form == "causal"))["grad_0"]
        assert (results["grad_0"].double() - truth).norm() < 1.3 * (eager.double() - truth).norm()
        monkeypatch.setattr(attention_tail, "wanted", lambda q: attention_tail.NONE)
        without = results_and_grads(OP.fused, args)["grad_0"]
        assert (without.double() - truth).norm() > 50 * floor


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_the_decoding_kernels_keep_it_as_well(dtype, monkeypatch):
    called = []
    forward = attention_decode.forward
    monkeypatch.setattr(attention_decode, "forward", lambda *args: called.append(1) or forward(*args))
    assert_as_close_as_products_are(arguments(*alike(150, dtype, queries=1)))
    assert called


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_output_and_tail_are_the_output_to_more_bits(dtype):
    q, k, v = (heads("cuda", 1, 100, 2, 32, dtype) for _ in "qkv")
    out, _, tail = kept(q, k, v, attention_tail.GIVEN)
    whole = rejoined(out, tail)
    assert (whole.to(dtype) != out).float().mean() < 0.02  # half a step and a bit is half a step in the tail
    assert (whole.to(dtype).float() - out.float()).abs().max() <= 2 * (whole - out.float()).abs().max()
    share = (whole - out.float()).norm() / out.float().norm()
    assert 0.2 < share * 2 ** (9 if dtype == torch.bfloat16 else 12) < 1  # of half a step
    # Alike scores make P exact in 16 bits but for one factor, which the sum takes out: y is the mean.
    q, k, v = (q * 0.0).detach(), k.detach(), v.detach()
    out, _, tail = kept(q, k, v, attention_tail.GIVEN)
    truth = reference(*widen((q, k, v)))
    error, alone = ((x.double() - truth).norm() for x in (rejoined(out, tail), out))
    assert error < alone / 100


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_what_is_not_finite_stays_so(dtype):
    q, k, v = (heads("cuda", 1, 80, 1, 32, dtype).detach() for _ in "qkv")
    v[..., 0], v[..., 1] = float("inf"), float("nan")
    out, _, tail = kept(q, k, v, attention_tail.GIVEN)
    whole = rejoined(out, tail)
    assert torch.equal(whole.isnan(), out.isnan()) and torch.equal(whole.isinf(), out.isinf())
    assert out[..., 0].isinf().all() and out[..., 1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_who_asks_for_none_gets_none(dtype):
    q, k, v = (heads("cuda", 1, 80, 1, 32, dtype) for _ in "qkv")
    assert kept(q, k, v, attention_tail.NONE)[2].numel() == 0
    for asked in (attention_tail.GIVEN, attention_tail.IF_OWN):
        out, _, tail = kept(q, k, v, asked)
        assert torch.equal(out, kept(q, k, v, attention_tail.NONE)[0])
        assert tail.dtype == torch.int8
        assert tail.numel() == (0 if dtype == torch.float32 else out.numel())


def test_of_a_library_there_is_none_or_zeros():
    """None in a step that runs as it is written; in a traced graph, whose shapes hold for whoever computes,
    zeros. Either way our backward kernels make of it what they make of the output alone."""
    q, k, v = (heads("cuda", 1, 80, 2, 32, torch.bfloat16) for _ in "qkv")
    with forced(Library("stand-in", lambda *_: None, exact, lambda: None)):
        out, stats, tail = kept(q, k, v, attention_tail.IF_OWN)
        assert tail.numel() == 0
        grads = results_and_grads(OP.fused, (q, k, v))
        zeros = kept(q, k, v, attention_tail.GIVEN)[2]
    assert zeros.numel() == out.numel() and not zeros.any()
    settings = arguments(q, k, v)[3:]
    settings = (*settings[:2], 32**-0.5, *settings[3:])
    dy = torch.ones_like(out)
    for given in (tail, zeros):
        inner = torch.ops.fusekit.attention_backward(
            dy, q.detach(), k.detach(), v.detach(), out, stats, given, False, *settings
        )
        truth = torch.autograd.grad(OP.fused(q, k, v), (q, k, v), dy)
        for ours, other in zip(inner[:3], truth, strict=True):
            torch.testing.assert_close(ours, other, rtol=0.02, atol=0.02)
    assert {"grad_0", "grad_1", "grad_2"} <= set(grads)
