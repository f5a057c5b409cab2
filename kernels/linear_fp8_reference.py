"""`linear_fp8` in plain PyTorch: what its kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.fp8_format import dequantise, group_of, quantise
from fusekit.kernels.fp8_operand import Quantised
from fusekit.kernels.linear_act import _rows
from fusekit.kernels.recipe import Recipe


def _round_trip(x: Tensor, recipe: Recipe, which: int, scale: Tensor | None, transposed: bool) -> Tensor:
    """x (0), weight (1) or gradient (2) behind Q, in its own orientation, quantised as `transposed` says."""
    dtype = recipe.gradient if which == 2 else recipe.forward
    wide = torch.promote_types(x.dtype, torch.float32)
    seen = x.t() if transposed else x
    group = group_of(recipe, (seen.shape[0], seen.shape[1]), weight=which == 1)
    own = scale[which] if recipe.delayed and scale is not None else None
    values = dequantise(quantise(seen, dtype, group, recipe.power_of_two, own), group, wide)
    return values.t() if transposed else values


class _StraightThrough(torch.autograd.Function):
    """z of the rows of x, in at least float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.recipe = recipe
        wide = torch.promote_types(x.dtype, torch.float32)
        if not recipe.output:
            return x.to(wide) @ weight.to(wide).t()
        return _round_trip(x, recipe, 0, scale, False) @ _round_trip(weight, recipe, 1, scale, False).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight, scale), recipe, g = ctx.saved_tensors, ctx.recipe, grads[0]
        wide = g.dtype
        g_input = _round_trip(g, recipe, 2, scale, False) if recipe.grad_input else g
        w = _round_trip(weight, recipe, 1, scale, True).to(wide) if recipe.grad_input else weight.to(wide)
        g_weight = _round_trip(g, recipe, 2, scale, True) if recipe.grad_weight else g
        x_weight = _round_trip(x, recipe, 0, scale, True).to(wide) if recipe.grad_weight else x.to(wide)
        return (g_input @ w).to(x.dtype), (g_weight.t() @ x_weight).to(weight.dtype), None, None


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    recipe: str = "fp8-tensorwise",
    scale: Tensor | None = None,
    amax: Tensor | None = None,
    x_operand: Sequence[Tensor] | None = None,
    w_operand: Sequence[Tensor] | None = None,
    maxima: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch; products in at least float32, one rounding. Leaves amax and maxima alone,
    and reads nothing of operands but the delayed scale they were made with."""
    scale = _scales_of_operands(scale, x_operand, w_operand) if Recipe.parse(recipe).delayed else scale
    z = _StraightThrough.apply(_rows(x), weight, Recipe.parse(recipe), scale)
    z = z if bias is None else z + bias.to(z.dtype)
    return ACTIVATIONS[act].reference(z).to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _scales_of_operands(scale: Tensor | None, *operands: Sequence[Tensor] | None) -> Tensor | None:
    for which, operand in enumerate(operands):
        inverses = [t for t in (Quantised(*operand)[1::2] if operand else ()) if t.dim() == 2]
        if scale is not None and inverses:
            scale = scale.clone()
            scale[which] = inverses[0].flatten()[0].reciprocal()
    return scale
