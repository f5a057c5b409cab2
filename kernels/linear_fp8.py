r"""Linear layer whose matrix products have FP8 operands.

    z = Q(x) Q(w)^T + bias,   y = act(z)
    grad_input = Q(dz) Q(w),   grad_weight = Q(dz)^T Q(x),   dz = dy * act'(z)

Q rounds to eight bits with a scale a group and back: fp8_format.py. Gradients pass Q unchanged
(straight-through); the bias gradient sums dz itself. Each product has the groups of its own contraction, so
an operand of two products is quantised in two layouts, both from its values. Micikevicius et al. 2022, "FP8
Formats for Deep Learning", arXiv:2209.05433; recipes: recipe.py.

M rows (tokens, the leading dimensions of x), N output features, K input features.
Saved for backward: the operands of the two later products as they enter them, and z where act' needs it.

Delayed scales: `scale` (3,) of x, weight and gradient is used as it is. Where `amax` (3,) is given it is
raised to the largest magnitudes seen, with current scales too. That is idempotent: the second forward pass of
an activation checkpoint leaves it as it was. A scale of 0 says that no step has been seen: the tensor's own
is used, as it is where `scale` is left out. Histories move once a step: fp8_history.py.

`maxima`, where given, is raised to y's largest magnitudes, for whoever quantises y: fp8_maxima.py.

`x_operand` and `w_operand` are x and weight as fp8_operand.py quantised them, in the layouts that it was
asked for. What is absent is quantised here. Where one is given, its scale counts and not that in `scale`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import fp8_choice, linear_fp8_cpu
from fusekit.kernels.fp8_operand import read
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.linear_act import _stores_z
from fusekit.kernels.linear_fp8_ops import backward_op, forward_op
from fusekit.kernels.linear_fp8_reference import reference
from fusekit.kernels.linear_fp8_samples import samples
from fusekit.kernels.linear_fp8_supports import supports
from fusekit.kernels.op import Op
from fusekit.kernels.recipe import Recipe


class _LinearFp8(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        act: str,
        recipe: str,
        scale: Tensor | None,
        amax: Tensor | None,
        x_operand: list[Tensor],
        w_operand: list[Tensor],
        maxima: Tensor | None,
    ) -> Tensor:
        chosen = Recipe.parse(recipe)
        needs = list(ctx.needs_input_grad[:3])
        saves = [needs[1], needs[0], any(needs)]
        y, z, x_saved, x_inverse, w_saved, w_inverse = forward_op(
            x, weight, bias, act, recipe, scale, amax, x_operand, w_operand, maxima, saves
        )
        if saves[0] and not chosen.grad_weight:
            x_saved = x
        elif saves[0] and (given := read(x_operand, chosen, linear_fp8_cpu.X)[1]) is not None:
            x_saved, x_inverse = given
        if saves[1] and not chosen.grad_input:
            w_saved = weight
        elif saves[1] and (given := read(w_operand, chosen, linear_fp8_cpu.WEIGHT)[1]) is not None:
            w_saved, w_inverse = given
        stores = any(needs) and act != "none"
        saved = None if not stores else z if _stores_z(act, None) else y
        ctx.save_for_backward(x_saved, x_inverse, w_saved, w_inverse, saved, scale)
        ctx.settings = (
            act,
            recipe,
            list(weight.shape),
            weight.dtype,
            (bias if bias is not None else weight).dtype,
        )
        ctx.needs, ctx.amax = needs, amax
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, x_inverse, weight, w_inverse, z, scale = ctx.saved_tensors
        refuse_double_backward("linear_fp8")
        found: list[Tensor | None] = [None, None, None]
        if any(ctx.needs):
            act, recipe, sizes, weight_dtype, bias_dtype = ctx.settings
            computed = backward_op(
                grads[0], x, x_inverse, weight, w_inverse, z, act, recipe, scale, ctx.amax, sizes,
                weight_dtype, bias_dtype, ctx.needs,
            )  # fmt: skip
            found = [grad if need else None for grad, need in zip(computed, ctx.needs, strict=True)]
        return *found, None, None, None, None, None, None, None


def _checked(
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
) -> tuple[Any, ...]:
    # Autocast lowers x alone: the weight is quantised from its master, and scale and amax stay float32.
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    reason = supports(x, weight, bias, act, recipe, scale, amax, x_operand, w_operand, maxima)
    if reason is not None:
        raise ValueError(f"linear_fp8: {reason}")
    return x, weight, bias, act, recipe, scale, amax, list(x_operand or ()), list(w_operand or ()), maxima


def _infer(*args: Any) -> Tensor:
    return forward_op(*_checked(*args), [False, False, False])[0]


def _differentiable(*args: Any) -> Tensor:
    return _LinearFp8.apply(*_checked(*args)) if torch.is_grad_enabled() else _infer(*args)


def _fake(*args: Any) -> Tensor:
    x, weight = _checked(*args)[:2]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


fused = define(
    "linear_fp8(Tensor x, Tensor weight, Tensor? bias=None, str act='none', str recipe='fp8-tensorwise',"
    " Tensor? scale=None, Tensor(a!)? amax=None, Tensor[]? x_operand=None, Tensor[]? w_operand=None,"
    " Tensor(b!)? maxima=None) -> Tensor",
    _infer,
    _fake,
    autograd=_differentiable,
)


def flops(x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * math.prod(x.shape[:-1]) * weight.shape[0] * weight.shape[1]


def runs_on(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    recipe: str = "fp8-tensorwise",
    *_: Any,
) -> str:
    """Who computes the products of this layer and why; of tensors no values are looked at."""
    return fp8_choice.describe(x, weight, bias, act, recipe) if on_gpu(x) else "emulated"


def measure(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    recipe: str = "fp8-tensorwise",
    *_: Any,
) -> dict[str, dict[str, float]]:
    """Seconds of whoever may compute each product, kept for later calls; empty without a choice."""
    return fp8_choice.measure(x, weight, bias, act, recipe) if on_gpu(x) else {}


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent="grad")
