"""Layers that keep the largest magnitudes of what they write: the bits of the pass that looks for them."""

from __future__ import annotations

import dataclasses

import fp8_checks as checks
import pytest
import torch

from fusekit.kernels.fp8_maxima import fp8_maxima
from fusekit.kernels.fp8_operand import fp8_operand
from fusekit.kernels.linear_fp8 import OP
from fusekit.kernels.parity import results_and_grads
from fusekit.kernels.recipe import PRESETS

scalings = pytest.mark.parametrize("scaling", ["fp8-tensorwise", "fp8-rowwise"])


def with_maxima(args: tuple, scaling: str) -> tuple:
    return (*args, None, None, None, None, fp8_maxima(args[0], args[1].shape[0], scaling))


@scalings
@pytest.mark.parametrize("name", PRESETS)
def test_operands_are_those_of_the_separate_pass(name: str, scaling: str) -> None:
    """Several tiles, ragged; y itself and the gradients stay as they were."""
    args = checks.arguments("cuda", torch.bfloat16, name, "gelu", shape=(150, 144, 160))
    counting = with_maxima(args, scaling)
    expected = results_and_grads(OP.fused, args)
    y = OP.fused(*counting).detach()
    assert torch.equal(y, expected["output"])
    assert (counting[-1].numel() == 1) == (scaling == "fp8-tensorwise")
    apart = fp8_operand(y, scaling, 0, y.dtype, True, True, None, None)
    again = fp8_operand(y, scaling, 0, y.dtype, True, True, None, None, counting[-1])
    assert all(map(torch.equal, again, apart))
    assert counting[-1][0] == (y if counting[-1].numel() == 1 else y.view(-1, 144)[0]).abs().max()
    found = results_and_grads(OP.fused, with_maxima(args, scaling))
    assert all(torch.equal(found[key], t) for key, t in expected.items())


@scalings
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(scaling: str, value: float) -> None:
    x, weight, bias, act, name = checks.arguments(
        "cuda", torch.bfloat16, "fp8-rowwise", "relu", shape=(34, 48, 64)
    )
    with torch.no_grad():
        x[0, 3, 5] = value
        args = with_maxima((x, weight, bias, act, name), scaling)
        y = OP.fused(*args)
        found = fp8_operand(y, scaling, 0, y.dtype, True, True, None, None, args[-1])
        apart = fp8_operand(y, scaling, 0, y.dtype, True, True, None, None)
    for ours, theirs in zip(found[1::2], apart[1::2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert ours.isnan().any()


def test_maxima_that_do_not_fit_are_refused() -> None:
    args = checks.arguments("cuda", torch.bfloat16, "fp8-tensorwise", shape=(34, 48, 64))
    with pytest.raises(ValueError, match="one a row and one a column"):
        OP.fused(*args, None, None, None, None, torch.zeros(7, device="cuda"))
    bf16 = dataclasses.replace(PRESETS["fp8-tensorwise"], output=False).token()
    with pytest.raises(ValueError, match="this recipe's output is none"):
        OP.fused(*args[:4], bf16, None, None, None, None, torch.zeros(1, device="cuda"))


@scalings
def test_an_empty_batch(scaling: str) -> None:
    args = checks.arguments("cuda", torch.bfloat16, "fp8-tensorwise", "gelu", shape=(34, 48, 64))
    counting = with_maxima((args[0].detach()[:, :0], *args[1:]), scaling)
    assert OP.fused(*counting).shape == (2, 0, 48) and not counting[-1].any()
