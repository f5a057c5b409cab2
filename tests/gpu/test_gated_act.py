"""gated_act's kernel: rows far apart, packed, frozen halves; the largest magnitudes that it keeps."""

from __future__ import annotations

import pytest
import torch

from fusekit.kernels.fp8_maxima import fp8_maxima
from fusekit.kernels.fp8_operand import fp8_operand
from fusekit.kernels.gated_act import OP
from fusekit.kernels.parity import results_and_grads

scalings = pytest.mark.parametrize("scaling", ["fp8-tensorwise", "fp8-rowwise"])


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to("cuda", dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("apart", [(1, 1), (3, 1), (1, 3), (3, 2)])
def test_rows_that_lie_apart(apart: tuple[int, int]) -> None:
    """gate and up, each with its own distance between rows; gradients are dense."""
    wide = tensors(torch.float32, *((21, 150 * n) for n in apart))
    gate, up = (t.detach()[:, :150].requires_grad_() for t in wide)
    found = results_and_grads(OP.fused, (gate, up, "gelu"))
    expected = results_and_grads(OP.reference, (gate, up, "gelu"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_half_without_a_gradient(frozen: int) -> None:
    args = tensors(torch.float32, (19, 40), (19, 40))
    args[frozen].requires_grad_(False)
    found, expected = (results_and_grads(f, (*args, "silu")) for f in (OP.fused, OP.reference))
    assert found.keys() == expected.keys() and len(found) == 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@scalings
@pytest.mark.parametrize("packed", [False, True])
def test_operands_are_those_of_the_separate_pass(scaling: str, packed: bool) -> None:
    """Several blocks, ragged; y and the gradients stay as they were."""
    gate, up = tensors(torch.bfloat16, (2, 21, 288 if packed else 144), (2, 21, 144))
    args = (gate, None if packed else up, "silu", packed)
    expected = results_and_grads(OP.fused, (*args[:3], packed))
    maxima = fp8_maxima(gate, 144, scaling, False)
    y = OP.fused(*args[:3], packed, maxima).detach()
    assert torch.equal(y, expected["output"])
    assert maxima.numel() == (1 if scaling == "fp8-tensorwise" else 42 + 144)
    given = (y, scaling, 0, y.dtype, True, True, None, None)
    assert all(map(torch.equal, fp8_operand(*given, maxima), fp8_operand(*given)))
    assert maxima[0] == (y if maxima.numel() == 1 else y.view(-1, 144)[0]).abs().max()
    again = results_and_grads(OP.fused, (*args[:3], packed, fp8_maxima(gate, 144, scaling, False)))
    assert all(torch.equal(again[key], value) for key, value in expected.items())


@scalings
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(scaling: str, value: float) -> None:
    gate, up = (t.detach() for t in tensors(torch.bfloat16, (34, 48), (34, 48)))
    up[3, 5] = value
    maxima = fp8_maxima(gate, 48, scaling, False)
    y = OP.fused(gate, up, "silu", False, maxima)
    assert not y[3, 5].isfinite()
    found = fp8_operand(y, scaling, 0, y.dtype, True, True, None, None, maxima)
    apart = fp8_operand(y, scaling, 0, y.dtype, True, True, None, None)
    for ours, theirs in zip(found[1::2], apart[1::2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert ours.isnan().any()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (((4, 6), (4, 5)), "differ in shape"),
        (((4, 5), None), "not even in number"),
        (((4, 6), (4, 6), "swish"), "is none of"),
        (((4, 6), (4, 6), "silu", True), "up is given"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: tuple, reason: str) -> None:
    made = [t if t is None else torch.randn(t, device="cuda") for t in args[:2]]
    with pytest.raises(ValueError, match=reason):
        OP.fused(*made, *args[2:])


def test_maxima_that_do_not_fit_are_refused() -> None:
    gate, up = tensors(torch.bfloat16, (34, 48), (34, 48))
    with pytest.raises(ValueError, match="one a row and one a column"):
        OP.fused(gate, up, "silu", False, torch.zeros(7, device="cuda"))
    with pytest.raises(ValueError, match="cast one"):
        OP.fused(gate, up.float())
