"""Largest magnitudes of what an op is about to write, for the cast that follows: one read of it less.

    maxima = fp8_maxima(x, N, recipe)                       zeros, of the recipe that y will be quantised by
    y = linear_fp8(x, weight, ..., maxima=maxima)           raised while y is in registers; gated_act alike
    operand = fp8_operand(y, recipe, ..., maxima=maxima)

One element where one scale serves a tensor; M + N with scales of rows, of y's rows and then of its columns.
A CPU keeps none and looks again: there what is quantised is swept in blocks that stay in cache. Of layers,
`by_product`, GPUs other than sm_90 keep none either: the products that count spill registers on sm_80, and on
sm_100 Triton 3.6 does not compile them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusekit.kernels.config_table import target_of
from fusekit.kernels.launch import capability, on_gpu
from fusekit.kernels.library import define
from fusekit.kernels.recipe import Recipe


def helps(recipe: Recipe) -> bool:
    """Whether the cast of this recipe looks for largest magnitudes before it casts."""
    return recipe.scaling in ("tensor", "row") and not recipe.delayed


def keeps_count(recipe: Recipe) -> bool:
    """Whether a layer of this recipe can raise maxima: its output is a product of our own kernel."""
    return recipe.output and recipe.accumulation != "exact"


def misfit(maxima: Tensor, x: Tensor, features: int) -> str | None:
    """Why these are not of a tensor of x's rows and so many columns, as a sentence."""
    sizes = 0, 1, math.prod(x.shape[:-1]) + features
    if maxima.dtype != torch.float32 or maxima.dim() != 1 or maxima.shape[0] not in sizes:
        return (
            f"maxima is {maxima.dtype} {tuple(maxima.shape)}, not float32 of 1 element or of {sizes[2]}, "
            f"one a row and one a column of the output"
        )
    return None


def why_not(maxima: Tensor, x: Tensor, weight: Tensor, recipe: Recipe) -> str | None:
    """Why a layer of this recipe cannot raise these, as a sentence."""
    if reason := misfit(maxima, x, weight.shape[0]):
        return reason
    if not keeps_count(recipe):
        return "maxima are kept by FP8 products, and this recipe's output is none; leave them out"
    return None


def _make(x: Tensor, features: int, recipe: str, by_product: bool = True) -> Tensor:
    chosen = Recipe.parse(recipe)
    counts = on_gpu(x) and helps(chosen) and (not by_product or target_of(capability(x)) == "sm_90")
    if not counts:
        return x.new_empty((0,), dtype=torch.float32)
    size = 1 if chosen.scaling == "tensor" else math.prod(x.shape[:-1]) + features
    return x.new_zeros((size,), dtype=torch.float32)


_ARGUMENTS = "(Tensor x, SymInt features, str recipe, bool by_product=True) -> Tensor"
_maxima = define(f"fp8_zero_maxima{_ARGUMENTS}", _make, _make)
fp8_maxima = define(
    f"fp8_maxima{_ARGUMENTS}", _make, _make, autograd=lambda x, *rest: _maxima(x.detach(), *rest)
)
