"""The GPU path of linear_fp8: operands cast once into every layout that is needed, then the products."""

from __future__ import annotations

from torch import Tensor

from fusekit.kernels.fp8_cast import cast, empty_operand
from fusekit.kernels.fp8_choice import product
from fusekit.kernels.fp8_format import Operand
from fusekit.kernels.gemm import matmul, sum_partials
from fusekit.kernels.linear_act import _dact
from fusekit.kernels.recipe import Recipe

X, WEIGHT, GRADIENT = range(3)


def _cast(
    x: Tensor, recipe: Recipe, which: int, scale: Tensor | None, amax: Tensor | None,
    plain: bool, transposed: Operand | None,
) -> Operand | None:  # fmt: skip
    """Quantise x; returns the operand of x itself where it is wanted."""
    dtype = recipe.gradient if which == GRADIENT else recipe.forward
    weight = which == WEIGHT
    operand = empty_operand(x, recipe, weight, False) if plain else None
    if operand is not None or transposed is not None:
        own = scale[which : which + 1] if scale is not None and recipe.delayed else None
        largest = None if amax is None else amax[which : which + 1]
        cast(x, dtype, recipe, operand, transposed, weight=weight, scale=own, amax=largest)
    return operand


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    recipe: Recipe,
    scale: Tensor | None,
    amax: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    x_saved: Operand | None,
    w_saved: Operand | None,
    x_given: Operand | None = None,
    w_given: Operand | None = None,
    maxima: Tensor | None = None,
) -> None:
    """Write y and z, and the transposed operands that the two later products take, where not None.

    x_given, w_given: operands of this product that are made already. maxima: of y, as of fp8_gemm.product.
    """
    operands = []
    for t, which, saved, given in ((x, X, x_saved, x_given), (weight, WEIGHT, w_saved, w_given)):
        cast_here = _cast(t, recipe, which, scale, amax, recipe.output and given is None, saved)
        operands.append(given if recipe.output and given is not None else cast_here)
    x_operand, w_operand = operands
    bias = None if bias is None else bias.contiguous()
    if x_operand is None or w_operand is None:
        return matmul(x, weight.to(x.dtype).t(), y, bias=bias, act=act, z=z)
    product(
        x_operand, w_operand, y, recipe, (recipe.forward, recipe.forward), contraction=x.shape[1],
        square=recipe.scaling == "block", bias=bias, act=act, z=z, fast=recipe.accumulation == "fast",
        maxima=maxima,
    )  # fmt: skip


def backward(
    grad: Tensor,
    x: Tensor,
    x_inverse: Tensor,
    weight: Tensor,
    w_inverse: Tensor,
    z: Tensor | None,
    act: str,
    recipe: Recipe,
    scale: Tensor | None,
    amax: Tensor | None,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients that are not None; x and weight are what `forward` saved, or as they came."""
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    dz, partials = _dact(grad, z, act, grad_bias is not None)
    if partials is not None and grad_bias is not None:
        sum_partials(partials, grad_bias)
    if not dz.numel():
        if grad_weight is not None:
            grad_weight.zero_()
        return
    turned = None
    if grad_weight is not None and recipe.grad_weight:
        turned = empty_operand(dz, recipe, False, True)
    plain = grad_input is not None and recipe.grad_input
    operand = _cast(dz, recipe, GRADIENT, scale, amax, plain, turned)
    dtypes = recipe.gradient, recipe.forward
    if grad_input is not None:
        if operand is None:
            matmul(dz, weight.to(dz.dtype), grad_input)
        else:
            product(
                operand, Operand(weight, w_inverse), grad_input, recipe, dtypes, contraction=dz.shape[1],
                square=recipe.scaling == "block",
            )  # fmt: skip
    if grad_weight is not None:
        if turned is None:
            matmul(dz.t(), x, grad_weight)
        else:
            product(turned, Operand(x, x_inverse), grad_weight, recipe, dtypes, contraction=dz.shape[0])
