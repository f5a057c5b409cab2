"""attention_fp8's kernels: codes bit for bit, native and decoded products of every form, against float64."""

from __future__ import annotations

import attention_fp8_checks as checks
import pytest
import torch
from attention_fp8_checks import heads
from op_checks import small_samples
from torch import Tensor

from fusekit.kernels import attention_fp8_cast, attention_fp8_gpu
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_fp8 import OP, _form
from fusekit.kernels.attention_fp8_format import values, values_cpu
from fusekit.kernels.fp8_gemm import multiplies_fp8
from fusekit.kernels.parity import deterministic

BF16 = torch.bfloat16
NAMES = [sample.name for sample in small_samples(OP, "cpu", BF16)]
both = pytest.mark.parametrize("scaling", ["head", "block"])


def strange(T: int, D: int, dtype: torch.dtype) -> Tensor:
    """Heads of different size, a NaN, an infinity, zeros, and numbers far below the rest."""
    x = heads("cpu", 2, T, 2, D, dtype).detach().clone()
    x[0, 1] *= 200.0
    x[1, 0, :7] = 0.0
    x[1, 1, :5] *= 2.0**-10
    x[0, 0, 3, 4], x[1, 0, T - 2, 1] = float("nan"), float("-inf")
    return x


@both
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_codes_are_those_of_the_cpu(scaling: str, transposed: bool, dtype: torch.dtype) -> None:
    """160 features are cast by halves of a block."""
    for features, hardware in ((48, True), (48, False), (160, True))[: 3 if dtype == BF16 else 2]:
        x = strange(150, features, dtype)
        hardware = hardware and attention_fp8_cast.has_exact_cast(x.to("cuda"))
        held = attention_fp8_cast.cast(x.to("cuda"), scaling, transposed, hardware)
        found = attention_fp8_cast.values(held, scaling, 150, dtype, transposed)
        torch.testing.assert_close(found.cpu(), values_cpu(x, scaling), rtol=0, atol=0, equal_nan=True)
        padding = held.codes[..., 150:] if transposed else held.codes[:, :, 150:]
        assert not padding.any() and held.codes.shape[3 if transposed else 2] == 256


@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, sanitizer: bool) -> None:
    args = next(s.args for s in small_samples(OP, "cuda", BF16) if s.name == name)
    checks.assert_parity(args, ties=not sanitizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parity_of_other_dtypes(dtype: torch.dtype, sanitizer: bool) -> None:
    q, k, v = (heads("cuda", 1, 140, H, 32, dtype, seed=i) for i, H in enumerate((2, 1, 1)))
    args = (q, k, v, True, None, None, 0, None, None, "block")
    checks.assert_parity(args, ties=not sanitizer, tf32=dtype == torch.float32)


@both
@pytest.mark.parametrize("native", [True, False], ids=["native", "decoded"])
@pytest.mark.parametrize("form", ["causal", "window", "documents"])
def test_native_and_decoded_products(scaling: str, native: bool, form: str, sanitizer: bool) -> None:
    """Decoded products are exact, whatever the device has. Of the window some blocks are seen by all rows."""
    T = 400 if form == "window" else 300
    q, k, v = (heads("cuda", 1, T, H, 32, BF16, seed=i).detach() for i, H in enumerate((4, 2, 2)))
    if native and not multiplies_fp8(q):
        pytest.skip("this GPU has no FP8 products")
    documents = (torch.arange(300) // 70).to("cuda").view(1, 300) if form == "documents" else None
    given = (True, 32**-0.5, 230 if form == "window" else None, 0, documents, None)
    y, stats, *_ = attention_fp8_gpu.forward(q, k, v, _form(*given), scaling, native=native)
    exact = OP.reference(q.double(), k.double(), v.double(), *given, scaling)
    error = float((y.double() - exact).norm() / exact.norm())
    assert error < (4e-3 if sanitizer or not native else 2e-2)
    assert stats.isfinite().all() and (stats[0] == stats[0].round()).all()


def test_blocks_of_keys_are_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch, sanitizer: bool) -> None:
    """Largest scores that grow from block to block: what was summed is rescaled by powers of two."""
    q, k, v = (heads("cuda", 1, 200, 2, 32, BF16, seed=i).detach() for i in range(3))
    k = (k * torch.linspace(0.1, 4.0, 200).to("cuda", BF16).view(1, 1, 200, 1)).contiguous()
    form = Form(None, False, 0.5, 0.0, None, 0, False, None, 0, None, None)
    found = []
    for block_n in (32, 128):
        monkeypatch.setattr(attention_fp8_gpu, "CONFIGS", {64: (64, block_n, 4, 2)})
        found.append(attention_fp8_gpu.forward(q, k, v, form, "head", native=True)[0].float())
    limit = 2.0**-8 if sanitizer else 2e-2
    assert float((found[0] - found[1]).norm() / found[1].norm()) < limit


@both
def test_non_finite_input_is_not_hidden(scaling: str) -> None:
    checks.assert_non_finite_rows("cuda", scaling, BF16)


def test_values_of_another_width(sanitizer: bool) -> None:
    q, k, v = (heads("cuda", 1, 70, 2, D, BF16, seed=i) for i, D in enumerate((48, 48, 16)))
    checks.assert_parity((q, k, v, True), ties=not sanitizer)


def test_no_keys_give_zeros() -> None:
    checks.assert_no_keys_give_zeros("cuda")


def test_decoded_products_keep_a_nan() -> None:
    q, k, v = (heads("cuda", 1, 40, 1, 32, BF16, seed=i).detach() for i in range(3))
    v[0, 0, 7, 3] = float("nan")
    form = Form(None, True, 1.0, 0.0, None, 0, False, None, 0, None, None)
    y = attention_fp8_gpu.forward(q, k, v, form, "head", native=False)[0]
    assert y[0, 0, 7:, 3].isnan().all() and y[0, 0, :, :3].isfinite().all()


def test_saved_are_codes_and_a_tail_of_a_byte_and_results_repeat() -> None:
    q, k, v = (heads("cuda", 1, 128, 2, 64, BF16, seed=i) for i in range(3))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        OP.fused(q, k, v, True)
    assert sorted(t.dtype.itemsize for t in kept if t.numel() == q.numel()) == [1, 1, 1, 1, 2]
    assert deterministic(OP.fused, (q, k, v, True))


def test_values_of_the_reference_are_those_of_the_device() -> None:
    x = strange(70, 16, BF16)
    torch.testing.assert_close(
        values(x.to("cuda"), "block").cpu(), values(x, "block"), rtol=0, atol=0, equal_nan=True
    )
