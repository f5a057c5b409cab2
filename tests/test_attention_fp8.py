"""attention_fp8 on a CPU: codes, the float64 reference that rounds the same, what FP8 loses, bad input."""

from __future__ import annotations

import math
from typing import Any

import attention_fp8_checks as checks
import pytest
import torch
from attention_fp8_checks import heads
from op_checks import (
    assert_double_backward_is_refused,
    assert_fake_tells_the_truth,
    assert_gradients_may_be_expanded,
    assert_honours_autocast,
    every_dtype,
    small_samples,
)
from torch import Tensor

from fusekit.kernels import attention_blocked
from fusekit.kernels.attention_fp8 import OP
from fusekit.kernels.attention_fp8_format import CODE, round_p, values, values_cpu
from fusekit.kernels.parity import deterministic, results_and_grads, widen

BF16 = torch.bfloat16
NAMES = [sample.name for sample in small_samples(OP, "cpu", BF16)]
both = pytest.mark.parametrize("scaling", ["head", "block"])


def sample(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return next(s.args for s in small_samples(OP, "cpu", dtype) if s.name == name)


def qkv(T: int = 96, dtype: torch.dtype = BF16, H: int = 2, D: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads("cpu", 1, T, H, D, dtype, seed=i) for i in range(3))
    return q, k, v


def relative(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


@every_dtype
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_float64_on_the_same_codes(name: str, dtype: torch.dtype) -> None:
    checks.assert_parity(sample(name, dtype))


@pytest.mark.parametrize("name", ["plain, head", "causal, block", "documents, head"])
def test_the_criterion_for_devices_with_narrow_sums_passes_too(name: str) -> None:
    checks.assert_parity(sample(name, BF16), ties=True)


@both
@every_dtype
def test_values_are_those_of_the_codes(scaling: str, dtype: torch.dtype) -> None:
    """By hand: the largest power of two that keeps a group within 448, nearest even, and back."""
    x = (heads("cpu", 2, 200, 2, 16, dtype) * torch.tensor([1.0, 37.0]).view(1, 2, 1, 1)).to(dtype).detach()
    x[0, 0, :5, 0] = torch.tensor([0.0, 1e-6, -1e-6, 447.0, 465.0]).to(dtype)
    x[1, 1, 128:] = 0.0
    expected = torch.empty(x.shape)
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        for rows in (slice(0, 200),) if scaling == "head" else (slice(0, 128), slice(128, 200)):
            group = x[b, h, rows].float()
            amax = group.abs().max().item()
            scale = 2.0 ** math.floor(math.log2(448 / amax)) if amax else 1.0
            expected[b, h, rows] = (group * scale).clamp(-448, 448).to(CODE).float() / scale
    assert torch.equal(values(x, scaling).float(), expected)
    assert torch.equal(values_cpu(x, scaling).float(), expected)


@both
def test_values_of_what_is_not_finite_and_of_extremes(scaling: str) -> None:
    x = heads("cpu", 1, 150, 2, 16, BF16).detach().clone()
    x[0, 0, 3, 4], x[0, 1, 140, 0] = math.nan, math.inf
    x[0, 1, :20] *= 1e30
    x[0, 0, 130:] *= 1e-30
    for found in (values(x, scaling), values_cpu(x, scaling)):
        assert torch.equal(found.isnan(), ~x.isfinite())
    torch.testing.assert_close(
        values_cpu(x, scaling).float(), values(x, scaling), rtol=0, atol=0, equal_nan=True
    )
    clean = torch.where(x.isfinite(), x, 0.0)
    torch.testing.assert_close(
        values(x, scaling).nan_to_num(0.0), values(clean, scaling), rtol=0, atol=0
    )  # the scale is that of the finite numbers


def test_p_is_rounded_as_e4m3() -> None:
    """Every code up to 256, the middles between them and what is next to those, as torch's cast has it."""
    codes = torch.arange(0, 0x79, dtype=torch.uint8).view(CODE).float()
    middles = (codes[1:] + codes[:-1]) / 2
    tensors = [codes, middles, *(torch.nextafter(middles, torch.tensor(t)) for t in (0.0, 300.0))]
    e = torch.cat([*tensors, torch.rand(4096) * 2.0 ** torch.arange(-12, 9).repeat(196)[:4096]])
    e = e[e <= 256]
    assert torch.equal(round_p(e), e.to(CODE).float())
    assert torch.equal(round_p(e.double()).float(), e.to(CODE).float())
    assert round_p(torch.tensor([math.nan])).isnan().all()


@both
@pytest.mark.parametrize("causal", [False, True])
def test_what_fp8_loses_of_gaussian_data(scaling: str, causal: bool) -> None:
    """Four operands of 2.6 % each, of which q and k meet in an exponent; and it is FP8, not bfloat16."""
    args = (*qkv(256, D=64), causal, None, None, 0, None, None, scaling)
    found = results_and_grads(OP.fused, args)
    exact = results_and_grads(checks.unquantised, widen(args))
    for name, limit in {"output": 0.06, "grad_0": 0.07, "grad_1": 0.07, "grad_2": 0.06}.items():
        assert 0.01 < relative(found[name], exact[name]) < limit, name


def test_a_scale_for_each_block_keeps_what_a_heads_scale_loses() -> None:
    q, k, v = (x.detach().clone() for x in qkv(256))
    for x in (q, k, v):
        x[:, :, 128:] *= 2.0**-12
    exact = checks.unquantised(*(x.double() for x in (q, k, v)), True, 1.0)
    y = {s: OP.fused(q, k, v, True, 1.0, None, 0, None, None, s) for s in ("head", "block")}
    late = {s: relative(t[:, :, 128:], exact[:, :, 128:]) for s, t in y.items()}
    assert late["block"] < 0.06 and torch.equal(y["head"][:, :, :128], y["block"][:, :, :128])


@both
def test_rows_add_up_to_one(scaling: str) -> None:
    """Equal values come out as they are, and then nothing can change the result: dq and dk are zero."""
    q, k, _ = qkv(130)
    v = torch.full_like(q, 0.75).requires_grad_()
    results = results_and_grads(OP.fused, (q, k, v, True, None, None, 0, None, None, scaling))
    assert (results["output"] - 0.75).abs().max() <= 0.75 * 2.0**-8
    reference = results_and_grads(OP.fused, (q, k, qkv(130)[2], True, None, None, 0, None, None, scaling))
    for name in ("grad_0", "grad_1"):
        assert results[name].norm() < 1e-3 * reference[name].norm()


def test_an_even_row_is_the_mean_of_its_values() -> None:
    _, k, v = qkv(100)
    y = OP.fused(torch.zeros_like(k), k, v)
    mean = values(v, "head").mean(2, keepdim=True).expand_as(y)
    assert relative(y, mean) < 2.0**-8


def test_a_gradient_with_a_large_mean_is_not_biased() -> None:
    """Every row of dP has a mean of 50 and a little beside it, all of which dq and dk are made of."""
    q, k, v = qkv(128)
    v = (v.detach() * 0.25 + 50.0 / 32).requires_grad_()
    args = (q, k, v, True)
    out, exact = OP.fused(*args), checks.unquantised(*widen(args))
    ones = torch.ones_like(out)
    found = torch.autograd.grad(out, args[:2], ones)
    defined = OP.reference(*(wide := widen(args)))
    for ours, theirs in zip(found, torch.autograd.grad(defined, wide[:2], ones.double()), strict=True):
        assert relative(ours, theirs) < 0.01
    assert relative(out, exact) < 0.01


@both
@every_dtype
def test_non_finite_input_is_not_hidden(scaling: str, dtype: torch.dtype) -> None:
    checks.assert_non_finite_rows("cpu", scaling, dtype)


@both
def test_zeros_and_rows_without_keys(scaling: str) -> None:
    zero = torch.zeros(1, 2, 40, 16, dtype=BF16, requires_grad=True)
    found = results_and_grads(OP.fused, (zero, zero, zero, True, None, None, 0, None, None, scaling))
    assert all(found[name].eq(0).all() for name in ("output", "grad_0", "grad_1"))
    assert found["grad_2"].norm() > 0 and all(t.isfinite().all() for t in found.values())
    q, k, v = qkv(40)
    found = results_and_grads(OP.fused, (q, k, v, True, None, None, -8, None, None, scaling))
    assert found["output"][:, :, :8].eq(0).all() and found["grad_0"][:, :, :8].eq(0).all()
    assert found["output"][:, :, 8:].norm(dim=-1).gt(0).all()


def test_values_of_another_width() -> None:
    q, k, v = (heads("cpu", 2, 70, 2, D, BF16, seed=i) for i, D in enumerate((48, 48, 16)))
    checks.assert_parity((q, k, v, True))


def test_no_keys_give_zeros() -> None:
    checks.assert_no_keys_give_zeros("cpu")


def test_blocks_of_queries_are_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    args = (*qkv(100), True)
    whole = results_and_grads(OP.fused, args)
    monkeypatch.setattr(attention_blocked, "SCORES", 2 * 100 * 7)
    parts = results_and_grads(OP.fused, args)
    for name, t in whole.items():
        assert relative(parts[name], t) < 2.0**-8, name


def test_one_gradient_of_three() -> None:
    q, k, v = (x.detach() for x in qkv(40))
    every = results_and_grads(OP.fused, (*(x.clone().requires_grad_() for x in (q, k, v)), True))
    alone = results_and_grads(OP.fused, (q, k, v.clone().requires_grad_(), True))
    assert set(alone) == {"output", "grad_2"} and torch.equal(alone["grad_2"], every["grad_2"])


def test_what_every_op_promises() -> None:
    assert_fake_tells_the_truth(OP, "cpu", BF16)
    assert_gradients_may_be_expanded(OP, "cpu", torch.float32)
    assert_double_backward_is_refused(OP, "cpu")
    assert_honours_autocast(OP, "cpu", BF16)
    assert deterministic(OP.fused, sample("documents, block", BF16))


@pytest.mark.parametrize("name", ["window, block", "documents, head", "empty batch"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(OP.fused, sample(name, torch.float32))


def test_bad_arguments_are_refused_in_a_sentence() -> None:
    q, k, v = qkv(20, D=24)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((q, k, v), "24 and 24 features: FP8 needs multiples of 16"),
        ((*qkv(20), False, None, None, 0, None, None, "tensor"), "'tensor' is none of head, block"),
        (tuple(x.double() for x in qkv(20)), "float64 is none of float32, float16, bfloat16"),
        ((*qkv(20), True, None, 0), "a window of 0 keys"),
        ((qkv(20)[0], *qkv(20, H=3)[1:]), "2 query heads are no multiple of 3 key heads"),
    ]
    for args, words in cases:
        with pytest.raises(ValueError, match=r"^attention_fp8: ") as caught:
            OP.fused(*args)
        assert words in str(caught.value)
