"""The CPU path of linear_fp8: operands that went through FP8 and back, and the processor's own products.

With scales that are powers of two, code / scale is a number of bfloat16: one bfloat16 product of such
operands, with its float32 accumulator, is the FP8 product, scales of any groups included. bfloat16 layers
take it where the processor multiplies bfloat16; everything else multiplies the same operands in float32.
accumulation="exact": fp8_exact.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import fp8_cpu, linear_cpu
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.fp8_exact import exact_product
from fusekit.kernels.fp8_format import Operand, group_of, inverse_of, used_scale
from fusekit.kernels.recipe import Recipe

X, WEIGHT, GRADIENT = range(3)


def operand_dtype(x_dtype: torch.dtype, recipe: Recipe) -> torch.dtype:
    """What the operands of a layer's FP8 products are kept in between Q and the product."""
    folds = recipe.power_of_two and recipe.accumulation != "exact"
    if x_dtype == torch.bfloat16 and folds and linear_cpu.multiplies(torch.bfloat16):
        return torch.bfloat16
    return torch.float32


def one_layout(recipe: Recipe, which: int) -> bool:
    """Whether one group, or square ones, give both layouts of an operand the same values."""
    return recipe.scaling == "tensor" or (which == WEIGHT and recipe.scaling == "block")


def through_fp8(
    x: Tensor, recipe: Recipe, which: int, transposed: bool, scale: Tensor | None, amax: Tensor | None,
    dtype: torch.dtype, inverse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Q(x) for the product that contracts x's last dimension, or its first where `transposed`; x's shape.

    inverse: one element that gets the inverse of a delayed scale.
    """
    code = recipe.gradient if which == GRADIENT else recipe.forward
    rows, columns = (int(size) for size in x.shape)
    if transposed:
        columns, rows = group_of(recipe, (columns, rows), weight=which == WEIGHT)
    else:
        rows, columns = group_of(recipe, (rows, columns), weight=which == WEIGHT)
    own = scale[which] if recipe.delayed and scale is not None else None
    values, largest = fp8_cpu.through_fp8(x, code, (rows, columns), dtype, recipe.power_of_two, own)
    if amax is not None and x.numel():
        # .data: a checkpoint that keeps amax as an input would take the write for a change of its input, and
        # its second pass finds the same maximum.
        seen = amax.data[which]
        torch.maximum(seen, largest.reshape(()), out=seen)
    if inverse is not None:
        if not x.numel():
            largest = torch.zeros(1, 1)
        inverse.copy_(inverse_of(used_scale(largest, code, recipe.power_of_two, own), largest))
    return values


def product(a: Tensor, b: Tensor, output: Tensor, recipe: Recipe) -> None:
    """output = a @ b, (M, K) and (K, N) of `through_fp8`, rounded once to output's dtype."""
    if recipe.accumulation == "exact":
        output.copy_(exact_product(a, b))
    elif output.dtype == a.dtype:
        torch.mm(a, b, out=output)
    else:
        output.copy_(a @ b)


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
    x_saved: Tensor | None,
    w_saved: Tensor | None,
    x_given: Operand | None = None,
    w_given: Operand | None = None,
) -> None:
    """Write y and z, and Q(x) and Q(weight) as the two later products take them, where not None.

    x_given, w_given: Q(x) and Q(weight) for this product, where they are made already.
    """
    dtype = operand_dtype(x.dtype, recipe)
    operands = []
    for t, which, saved, given in ((x, X, x_saved, x_given), (weight, WEIGHT, w_saved, w_given)):
        if not recipe.output:
            own = t.to(x.dtype)
        elif given is not None:
            own = given.codes
        else:
            own = through_fp8(t, recipe, which, False, scale, amax, dtype)
        if saved is not None:
            again = recipe.output and one_layout(recipe, which)
            saved.copy_(own if again else through_fp8(t, recipe, which, True, scale, amax, dtype))
        operands.append(own)
    x, weight = operands
    wide = bias is not None and bias.dtype != x.dtype  # a float32 bias is added to float32 sums, as on a GPU
    if recipe.output and recipe.accumulation == "exact":
        exact = exact_product(x, weight.t())
        exact = exact if bias is None else exact + bias
        for target, value in ((z, exact), (y, ACTIVATIONS[act].reference(exact))):
            if target is not None:
                target.copy_(value)
    elif x.dtype == y.dtype and not wide:
        linear_cpu.forward(x, weight, bias, None, act, y, z)
    else:
        linear_cpu._forward_widened(x, weight, bias, None, act, y, z)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
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
    dz = linear_cpu._dact(grad, z, act, grad_bias)
    dtype = operand_dtype(dz.dtype, recipe)
    rounded = None
    if grad_input is not None:
        if recipe.grad_input:
            rounded = through_fp8(dz, recipe, GRADIENT, False, scale, amax, dtype)
            product(rounded, weight, grad_input, recipe)
        else:
            torch.mm(dz, weight.to(dz.dtype), out=grad_input)
    if grad_weight is not None:
        if recipe.grad_weight:
            if rounded is None or recipe.scaling != "tensor":
                rounded = through_fp8(dz, recipe, GRADIENT, True, scale, amax, dtype)
            product(rounded.t(), x, grad_weight, recipe)
        else:
            grad_weight.copy_(dz.t() @ x)
