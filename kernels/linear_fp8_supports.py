"""Which arguments linear_fp8 takes: None, or a sentence that says what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusekit.kernels import fp8_maxima
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.fp8_operand import why_not
from fusekit.kernels.op import not_runnable
from fusekit.kernels.recipe import Recipe

MULTIPLE = 16  # features: tensor cores take FP8 rows that are 16 bytes apart


def supports(
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
) -> str | None:
    """None, or why linear_fp8 does not run on these arguments."""
    if act not in ACTIVATIONS:
        return f"activation {act!r} is none of {', '.join(ACTIVATIONS)}"
    try:
        chosen = Recipe.parse(recipe)
    except ValueError as error:
        return str(error)
    if x.dim() == 0 or weight.dim() != 2:
        return f"x {tuple(x.shape)} needs a last dimension of features, and weight {tuple(weight.shape)} two"
    N, K = weight.shape
    if x.shape[-1] != K:
        return (
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} differ in input features; weight is (N, K)"
        )
    if not N or not K or N % MULTIPLE or K % MULTIPLE:
        return f"weight {tuple(weight.shape)} has a dimension that {MULTIPLE} does not divide; FP8 needs that"
    if bias is not None and tuple(bias.shape) != (N,):
        return f"bias {tuple(bias.shape)} is not ({N},), one value per output feature"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            return f"x is {x.dtype} and {name} is {tensor.dtype}; it may be x's dtype or float32"
    for name, state in (("scale", scale), ("amax", amax)):
        if state is not None and (state.dtype != torch.float32 or tuple(state.shape) != (3,)):
            return f"{name} is {state.dtype} {tuple(state.shape)}, not float32 (3,): x, weight, gradient"
    if amax is not None and chosen.scaling != "tensor":
        return f"amax is of one group a tensor, and scaling={chosen.scaling!r} has many; leave it out"
    if maxima is not None and (reason := fp8_maxima.why_not(maxima, x, weight, chosen)):
        return reason
    for operand, tensor in ((x_operand, x), (w_operand, weight)):
        if reason := why_not(operand, tensor):
            return reason
    return not_runnable(x, weight, bias, scale, amax, maxima)
