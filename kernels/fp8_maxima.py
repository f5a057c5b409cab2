"""Largest magnitudes of what a layer is about to write, for the cast that follows: one read of it less.

    maxima = fp8_maxima(x, weight, recipe)                  zeros, of the recipe that y will be quantised by
    y = linear_fp8(x, weight, ..., maxima=maxima)           raised while y is in registers
    operand = fp8_operand(y, recipe, ..., maxima=maxima)

One element where one scale serves a tensor; M + N with scales of rows, of y's rows and then of its columns.
A CPU keeps none and looks again: there what is quantised is swept in blocks that stay in cache. So do GPUs
other than sm_90: the products that count spill registers on sm_80, and on sm_100 Triton 3.6 does not compile
them.
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


def why_not(maxima: Tensor, x: Tensor, weight: Tensor, recipe: Recipe) -> str | None:
    """Why a layer of this recipe cannot raise these, as a sentence."""
    sizes = 0, 1, math.prod(x.shape[:-1]) + weight.shape[0]
    if maxima.dtype != torch.float32 or maxima.dim() != 1 or maxima.shape[0] not in sizes:
        return (
            f"maxima is {maxima.dtype} {tuple(maxima.shape)}, not float32 of 1 element or of {sizes[2]}, "
            f"one a row and one a column of the output"
        )
    if not keeps_count(recipe):
        return "maxima are kept by FP8 products, and this recipe's output is none; leave them out"
    return None


def _make(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    chosen = Recipe.parse(recipe)
    if not on_gpu(x) or not helps(chosen) or target_of(capability(x)) != "sm_90":
        return x.new_empty((0,), dtype=torch.float32)
    size = 1 if chosen.scaling == "tensor" else math.prod(x.shape[:-1]) + weight.shape[0]
    return x.new_zeros((size,), dtype=torch.float32)


_maxima = define("fp8_zero_maxima(Tensor x, Tensor weight, str recipe) -> Tensor", _make, _make)
fp8_maxima = define(
    "fp8_maxima(Tensor x, Tensor weight, str recipe) -> Tensor",
    _make,
    _make,
    autograd=lambda x, weight, recipe: _maxima(x.detach(), weight.detach(), recipe),
)
