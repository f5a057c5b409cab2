"""The CPU path of linear_fp8: operands that went through FP8 and back, and the processor's own products.

With scales that are powers of two, code / scale is a number of bfloat16: one bfloat16 product of such
operands, with its float32 accumulator, is the FP8 product, scales of any groups included. bfloat16 layers
take it where the processor multiplies bfloat16; everything else multiplies the same operands in float32.

"exact": a float64 product whose every partial sum float64 holds, so that no order of summation can change a
bit. Where the operands' range is too wide for that, one of them is cut in two by magnitude, and so on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusekit.kernels import fp8_cpu, linear_cpu
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.fp8_format import group_of
from fusekit.kernels.recipe import Recipe

X, WEIGHT, GRADIENT = range(3)


def operand_dtype(x_dtype: torch.dtype, recipe: Recipe) -> torch.dtype:
    """What the operands of a layer's FP8 products are kept in between Q and the product."""
    folds = recipe.power_of_two and recipe.accumulation != "exact"
    if x_dtype == torch.bfloat16 and folds and linear_cpu.multiplies(torch.bfloat16):
        return torch.bfloat16
    return torch.float32


def through_fp8(
    x: Tensor, recipe: Recipe, which: int, transposed: bool, scale: Tensor | None, amax: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Q(x) for the product that contracts x's last dimension, or its first where `transposed`; x's shape."""
    code = recipe.gradient if which == GRADIENT else recipe.forward
    rows, columns = (int(size) for size in x.shape)
    if transposed:
        columns, rows = group_of(recipe, (columns, rows), weight=which == WEIGHT)
    else:
        rows, columns = group_of(recipe, (rows, columns), weight=which == WEIGHT)
    own = scale[which] if recipe.delayed and scale is not None else None
    values, largest = fp8_cpu.through_fp8(x, code, (rows, columns), dtype, recipe.power_of_two, own)
    if own is not None and amax is not None and x.numel():
        torch.maximum(amax[which], largest.reshape(()), out=amax[which])
    return values


def product(a: Tensor, b: Tensor, output: Tensor, recipe: Recipe) -> None:
    """output = a @ b, (M, K) and (K, N) of `through_fp8`, rounded once to output's dtype."""
    if recipe.accumulation == "exact":
        output.copy_(exact_product(a.double(), b.double()))
    elif output.dtype == a.dtype:
        torch.mm(a, b, out=output)
    else:
        output.copy_(a @ b)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of float64 with at most 4 significant bits an element: the same bits in any order of sums."""
    if not (a.numel() and b.numel()):
        return a @ b
    spans = []
    for t, dim in ((a, 1), (b, 0)):
        magnitudes = t.abs()
        smallest = torch.where(magnitudes > 0, magnitudes, torch.inf).min().item()
        if not math.isfinite(smallest):  # zeros only, or a NaN
            return a @ b
        # Partial sums are bounded by the norms (Cauchy-Schwarz), and multiples of the last bits' product.
        longest = t.norm(dim=dim).max().item()
        spans.append((math.log2(longest) - (math.floor(math.log2(smallest)) - 3), smallest, magnitudes))
    if not all(math.isfinite(span) for span, _, _ in spans) or sum(span for span, _, _ in spans) < 53:
        return a @ b
    wider = int(spans[1][0] > spans[0][0])
    _, smallest, magnitudes = spans[wider]
    threshold = 2.0 ** ((math.log2(smallest) + math.log2(magnitudes.max().item())) / 2)
    whole = (a, b)[wider]
    large = torch.where(magnitudes >= threshold, whole, 0.0)
    small = whole - large
    parts = [(part, b) if wider == 0 else (a, part) for part in (large, small)]
    return exact_product(*parts[0]) + exact_product(*parts[1])


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
) -> None:
    """Write y and z, and Q(x) and Q(weight) as the two later products take them, where not None."""
    dtype = operand_dtype(x.dtype, recipe)
    shared = recipe.scaling == "tensor"  # one group: both layouts hold the same values
    operands = []
    for t, which, saved in ((x, X, x_saved), (weight, WEIGHT, w_saved)):
        own = None
        if recipe.output:
            own = through_fp8(t, recipe, which, False, scale, amax, dtype)
        if saved is not None:
            again = (
                own
                if own is not None and (shared or (which == WEIGHT and recipe.scaling == "block"))
                else None
            )
            saved.copy_(through_fp8(t, recipe, which, True, scale, amax, dtype) if again is None else again)
        operands.append(own)
    if recipe.output:
        x, weight = operands
    elif weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if recipe.output and recipe.accumulation == "exact":
        wide = exact_product(x.double(), weight.double().t())
        wide = wide if bias is None else wide + bias
        for target, value in ((z, wide), (y, ACTIVATIONS[act].reference(wide))):
            if target is not None:
                target.copy_(value)
    elif x.dtype == y.dtype:
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
        x = x.reshape(-1, x.shape[-1])
        if recipe.grad_weight:
            if rounded is None or recipe.scaling != "tensor":
                rounded = through_fp8(dz, recipe, GRADIENT, True, scale, amax, dtype)
            product(rounded.t(), x, grad_weight, recipe)
        else:
            grad_weight.copy_(dz.t() @ x)
