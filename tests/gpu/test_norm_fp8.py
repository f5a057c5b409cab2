"""Norms that quantise their y: bits of the norm and of the separate quantisation, the norm's gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fusekit.kernels import add_layer_norm, add_rms_norm, norm_fp8
from fusekit.kernels.fp8_operand import Quantised, fp8_operand
from fusekit.kernels.parity import results_and_grads
from fusekit.kernels.recipe import PRESETS

RECIPES = {
    "tensor": PRESETS["fp8-tensorwise"],
    "row": PRESETS["fp8-rowwise"],
    "any row": dataclasses.replace(PRESETS["fp8-rowwise"], power_of_two=False),
    "e5m2": dataclasses.replace(PRESETS["fp8-rowwise"], forward=torch.float8_e5m2),
}
NORMS = {
    "rms": (add_rms_norm.OP, norm_fp8.add_rms_norm_fp8),
    "layer": (add_layer_norm.OP, norm_fp8.add_layer_norm_fp8),
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
norms = pytest.mark.parametrize("norm", NORMS)


def arguments(norm: str, *shape: int, dtype: torch.dtype = torch.bfloat16, residual: bool = True) -> tuple:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_()

    x, weight, bias = draw(*shape), draw(shape[-1]), draw(shape[-1])
    rest = (weight, 1e-6, 1.0) if norm == "rms" else (weight, bias, 1e-5)
    return x, draw(*shape) if residual else None, *rest


def assert_same(found: tuple, args: tuple, op, recipe, turned: bool) -> None:
    y, h, codes, inverse, maxima = found
    expected = op.fused(*args)
    assert torch.equal(y, expected[0]) and torch.equal(h, expected[1])
    token = recipe.token()
    apart = Quantised(*fp8_operand(expected[0], token, 0, y.dtype, True, turned, None, None))
    if recipe.scaling == "row":
        assert torch.equal(codes, apart.codes) and torch.equal(inverse, apart.inverse)
        again = Quantised(*fp8_operand(y, token, 0, y.dtype, False, turned, None, None, maxima))
    else:
        amax = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
        again = Quantised(*fp8_operand(y, token, 0, y.dtype, True, turned, None, amax[0], maxima))
        fp8_operand(y, token, 0, y.dtype, True, turned, None, amax[1])
        assert torch.equal(*amax) and torch.equal(again.codes, apart.codes)
        assert torch.equal(again.inverse, apart.inverse)
    assert torch.equal(again.turned, apart.turned) and torch.equal(again.turned_inverse, apart.turned_inverse)


@norms
@recipes
@pytest.mark.parametrize("shape", [(3, 45, 160), (37, 257)], ids=str)
def test_codes_are_those_of_the_separate_pass(norm: str, recipe, shape: tuple[int, ...]) -> None:
    op, with_codes = NORMS[norm]
    for turned in (True, False):
        args = arguments(norm, *shape, residual=turned)
        with torch.no_grad():
            assert_same(with_codes(*args, recipe.token(), turned), args, op, recipe, turned)


@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(norm: str, dtype: torch.dtype) -> None:
    op, with_codes = NORMS[norm]
    args = arguments(norm, 20, 96, dtype=dtype)
    with torch.no_grad():
        assert_same(with_codes(*args, "fp8-rowwise", True), args, op, PRESETS["fp8-rowwise"], True)


@norms
@pytest.mark.parametrize("scaling", ["fp8-tensorwise", "fp8-rowwise"])
def test_gradients_are_the_norms(norm: str, scaling: str) -> None:
    op, with_codes = NORMS[norm]
    args = arguments(norm, 6, 130)
    expected = results_and_grads(op.fused, args)
    found = results_and_grads(with_codes, (*args, scaling, True))
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@norms
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_marked(norm: str, value: float) -> None:
    """One row, and all of it where one scale serves a tensor."""
    with_codes = NORMS[norm][1]
    args = arguments(norm, 9, 144)
    with torch.no_grad():
        args[0][3, 5] = value
        inverse = with_codes(*args, "fp8-rowwise", True)[3]
        assert inverse[0].isnan().tolist() == [row == 3 for row in range(9)]
        assert not with_codes(*args, "fp8-tensorwise", True)[4].isfinite().any()


@norms
def test_empty_rows(norm: str) -> None:
    args = arguments(norm, 0, 144)
    y, _, codes, *_ = NORMS[norm][1](*args, "fp8-rowwise", True)
    assert y.shape == (0, 144) and codes.shape == (0, 256)
    y.sum().backward()


@norms
def test_what_it_does_not_take(norm: str) -> None:
    with_codes = NORMS[norm][1]
    for name in ("fp8-block", "mxfp8", "fp8-delayed"):
        with pytest.raises(ValueError, match="one read of y already"):
            with_codes(*arguments(norm, 4, 144), name, True)
    with pytest.raises(ValueError, match="fewer than 65 columns"):
        with_codes(*arguments(norm, 4, 64), "fp8-rowwise", True)
    with pytest.raises(ValueError, match="not FP8"):
        token = dataclasses.replace(PRESETS["fp8-rowwise"], output=False).token()
        with_codes(*arguments(norm, 4, 144), token, True)
