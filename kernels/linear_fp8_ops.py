"""The two operators under linear_fp8: its forward and its backward pass on tensors, without autograd.

What is saved for backward is an output of the first and an input of the second; who computes is told by the
device of the tensors. Formulas and names: linear_fp8.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import linear_fp8_cpu, linear_fp8_gpu
from fusekit.kernels.fp8_cast import empty_operand
from fusekit.kernels.fp8_format import Operand
from fusekit.kernels.fp8_operand import read
from fusekit.kernels.launch import on_gpu, recording
from fusekit.kernels.library import define
from fusekit.kernels.linear_act import _optional_rows, _rows, _stores_z
from fusekit.kernels.recipe import Recipe


def _empty_saved(x: Tensor, dtype: torch.dtype, recipe: Recipe, weight: bool) -> tuple[Tensor, Tensor]:
    """On a GPU the codes and inverse scales of x's transpose; on a CPU x behind Q, which has no scales."""
    if on_gpu(x):
        return empty_operand(x, recipe, weight, True)
    kept = x.new_empty(x.shape, dtype=linear_fp8_cpu.operand_dtype(dtype, recipe))
    return kept, x.new_empty((0,), dtype=torch.float32)


def _empty_forward(
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
    saves: list[bool],
) -> tuple[Tensor, ...]:
    """y, z, and the operands of grad_weight (from x) and grad_input (from weight) with inverse scales, but
    those that are given."""
    chosen = Recipe.parse(recipe)
    shape = (*x.shape[:-1], weight.shape[0])
    stores = saves[2] and _stores_z(act, None)
    x_saved, x_inverse, w_saved, w_inverse = (x.new_empty((0,), dtype=torch.float32) for _ in range(4))
    if saves[0] and chosen.grad_weight and read(x_operand, chosen, linear_fp8_cpu.X)[1] is None:
        x_saved, x_inverse = _empty_saved(_rows(x), x.dtype, chosen, False)
    if saves[1] and chosen.grad_input and read(w_operand, chosen, linear_fp8_cpu.WEIGHT)[1] is None:
        w_saved, w_inverse = _empty_saved(weight, x.dtype, chosen, True)
    return x.new_empty(shape), x.new_empty(shape if stores else (0,)), x_saved, x_inverse, w_saved, w_inverse


def _forward(
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
    saves: list[bool],
) -> tuple[Tensor, ...]:
    results = _empty_forward(x, weight, bias, act, recipe, scale, amax, x_operand, w_operand, maxima, saves)
    y, z, x_saved, x_inverse, w_saved, w_inverse = results
    chosen = Recipe.parse(recipe)
    arguments = (_rows(x), weight, bias, act, chosen, scale, amax)
    x_given, w_given = read(x_operand, chosen, 0)[0], read(w_operand, chosen, 1)[0]
    outputs = (_rows(y), _rows(z) if z.dim() == y.dim() and z.numel() else None)
    keeps_x, keeps_w = x_saved.dim() == 2, w_saved.dim() == 2
    if not on_gpu(x):
        linear_fp8_cpu.forward(
            *arguments, *outputs, x_saved if keeps_x else None, w_saved if keeps_w else None, x_given, w_given
        )
    elif x.numel() or recording():
        linear_fp8_gpu.forward(
            *arguments, *outputs, Operand(x_saved, x_inverse) if keeps_x else None,
            Operand(w_saved, w_inverse) if keeps_w else None, x_given, w_given,
            None if maxima is None or not maxima.numel() else maxima,
        )  # fmt: skip
    return results


def _empty_backward(
    grad_output: Tensor,
    x: Tensor,
    x_inverse: Tensor,
    weight: Tensor,
    w_inverse: Tensor,
    z: Tensor | None,
    act: str,
    recipe: str,
    scale: Tensor | None,
    amax: Tensor | None,
    sizes: list[int],
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    N, K = sizes
    return (
        grad_output.new_empty((*grad_output.shape[:-1], K) if needs[0] else (0,)),
        grad_output.new_empty((N, K) if needs[1] else (0,), dtype=weight_dtype),
        grad_output.new_empty((N,) if needs[2] else (0,), dtype=bias_dtype),
    )


def _backward(
    grad_output: Tensor,
    x: Tensor,
    x_inverse: Tensor,
    weight: Tensor,
    w_inverse: Tensor,
    z: Tensor | None,
    act: str,
    recipe: str,
    scale: Tensor | None,
    amax: Tensor | None,
    sizes: list[int],
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty_backward(
        grad_output, x, x_inverse, weight, w_inverse, z, act, recipe, scale, amax, sizes, weight_dtype,
        bias_dtype, needs,
    )  # fmt: skip
    grad_input, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    rest = (
        _optional_rows(z), act, Recipe.parse(recipe), scale, amax, _optional_rows(grad_input), grad_weight,
        grad_bias,
    )  # fmt: skip
    if on_gpu(grad_output):
        linear_fp8_gpu.backward(_rows(grad_output), _rows(x), x_inverse, weight, w_inverse, *rest)
    else:
        linear_fp8_cpu.backward(_rows(grad_output), _rows(x), weight, *rest)
    # .data: at version 0, as a gradient that nobody has touched; passes/weights.py tells a window by it.
    return grads[0].data, grads[1].data, grads[2].data


forward_op = define(
    "linear_fp8_forward(Tensor x, Tensor weight, Tensor? bias, str act, str recipe, Tensor? scale,"
    " Tensor(a!)? amax, Tensor[] x_operand, Tensor[] w_operand, Tensor(b!)? maxima, bool[3] saves)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_forward,
)
backward_op = define(
    "linear_fp8_backward(Tensor grad_output, Tensor x, Tensor x_inverse, Tensor weight, Tensor w_inverse,"
    " Tensor? z, str act, str recipe, Tensor? scale, Tensor(a!)? amax, int[2] sizes, ScalarType weight_dtype,"
    " ScalarType bias_dtype, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_backward,
)
