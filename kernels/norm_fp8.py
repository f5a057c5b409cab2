r"""The norms of a residual sum whose y is read by linear_fp8: the kernel that makes y quantises it.

    y, h = add_rms_norm(x, residual, weight, eps, offset)        (add_layer_norm the same)
    codes, inverse = Q(y) as fp8_cast.py makes it from y, bit for bit: y is rounded to its dtype first

What is known while a row is at hand decides what the pass can write:

    row       the row's scale, so codes and inverse scales; of the second layout, whose scales are columns',
              the largest magnitudes: fp8_operand casts it with those, reading y once less
    tensor    no scale before the last row is done: the largest magnitude, and fp8_operand reads y once less
    delayed, block, mx    nothing is saved: both layouts come from one read of y as it is, and a tile of whole
              rows cannot write the second one, transposed, in more than a byte at a time

On a CPU y is quantised after it was made, in cache-sized blocks (fp8_cpu.py), and maxima are not kept.
Gradients are those of the norms: none passes through codes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels import add_layer_norm, add_rms_norm, linear_fp8_cpu
from fusekit.kernels._triton import tl, triton
from fusekit.kernels.fp8_cast import encode, encoding, has_exact_cast, padded, scales_of
from fusekit.kernels.launch import on_gpu, recording
from fusekit.kernels.library import Function, define
from fusekit.kernels.norm_launch import start_forward
from fusekit.kernels.recipe import Recipe

LEAST_COLUMNS = 65  # below, a tile of whole rows has fewer columns than codes are padded to


class Made(NamedTuple):
    """What a norm made beside y: codes and inverse scales of its rows, and largest magnitudes, of all of it
    or of each column. Empty where the scaling has none."""

    codes: Tensor
    inverse: Tensor
    maxima: Tensor


def why_not(y: Tensor, recipe: Recipe) -> str | None:
    """Why a norm's pass cannot quantise its y for this recipe, or would save nothing."""
    if recipe.delayed or recipe.scaling not in ("tensor", "row"):
        return "both layouts come from one read of y already"
    if not recipe.output:
        return "the product that reads rows is not FP8"
    if on_gpu(y) and y.shape[-1] < LEAST_COLUMNS:
        return f"fewer than {LEAST_COLUMNS} columns"
    if on_gpu(y) and recipe.scaling == "row" and not has_exact_cast(y):
        return "codes made by integers need the registers that hold the row"
    return None


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, codes_ptr, inverse_ptr,
    maxima_ptr, x_stride, residual_stride, M, N, eps, offset, pitch,
    RMS: tl.constexpr, E5M2: tl.constexpr, HARDWARE: tl.constexpr, LARGEST_CODE: tl.constexpr,
    TOP: tl.constexpr, LEAST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_N)[None, :]
    weight = 1.0
    bias = 0.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
        if RMS:
            weight += offset
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    largest = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        if RMS:
            y = _rms_rows(
                x_ptr, residual_ptr, h_ptr, rstd_ptr, x_stride, residual_stride, row, column, weight, M, N,
                eps, weight_ptr is not None,
            )  # fmt: skip
        else:
            y = _layer_rows(
                x_ptr, residual_ptr, h_ptr, mean_ptr, rstd_ptr, x_stride, residual_stride, row, column,
                weight, bias, M, N, eps, weight_ptr is not None, bias_ptr is not None,
            )  # fmt: skip
        inside = (row < M)[:, None] & (column < N)
        wide_row = row.to(tl.int64)[:, None]
        y = tl.where(inside, y, 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + wide_row * N + column, y, mask=inside)
        y = y.to(tl.float32)
        magnitude = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if maxima_ptr is not None:
            largest = tl.maximum(largest, magnitude)
        if codes_ptr is not None:
            scale, inverse = scales_of(tl.max(magnitude, 1), LARGEST_CODE, TOP, LEAST, POWER_OF_TWO)
            tl.store(inverse_ptr + row, inverse, mask=row < M)
            code = encode(y * scale[:, None], E5M2, HARDWARE)
            tl.store(codes_ptr + wide_row * pitch + column, code, mask=(row < M)[:, None] & (column < pitch))
    if maxima_ptr is not None:
        columns = tl.max(largest, 0)
        if codes_ptr is not None:
            place = tl.arange(0, BLOCK_N)
            tl.atomic_max(maxima_ptr + place, columns, mask=place < N, sem="relaxed")
        else:
            tl.atomic_max(maxima_ptr, tl.max(columns, 0), sem="relaxed")


_rms_rows, _layer_rows = add_rms_norm.normalised_rows, add_layer_norm.normalised_rows


def _empty_made(y: Tensor, recipe: Recipe, turned: bool) -> Made:
    """Maxima are zero: they are raised."""
    M, N = math.prod(y.shape[:-1]), y.shape[-1]
    codes, inverse, maxima = (y.new_empty((0,), dtype=torch.float32) for _ in range(3))
    if recipe.scaling == "tensor":
        return Made(codes, inverse, y.new_zeros((1,), dtype=torch.float32) if on_gpu(y) else maxima)
    if not on_gpu(y):
        kept = linear_fp8_cpu.operand_dtype(y.dtype, recipe)
        return Made(y.new_empty((M, N), dtype=kept), inverse, maxima)
    return Made(
        y.new_empty((M, padded(N)), dtype=torch.uint8),
        y.new_empty((1, M), dtype=torch.float32),
        y.new_zeros((N,), dtype=torch.float32) if turned else maxima,
    )


def _run(
    norm: Any, x: Tensor, residual: Tensor | None, parameters: list[Tensor | None], own: tuple[float, ...],
    recipe: str, turned: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, h, the row statistics, and what was made."""
    chosen, rms = Recipe.parse(recipe), norm is add_rms_norm
    if not on_gpu(x):
        y, *rest = norm._forward_native(x, residual, *parameters, *own)
        made = _empty_made(y, chosen, turned)
        if chosen.scaling == "row":
            through = linear_fp8_cpu.through_fp8(
                y.view(-1, y.shape[-1]), chosen, linear_fp8_cpu.X, False, None, None, made.codes.dtype
            )
            made = made._replace(codes=through)
        return y, *rest, *made
    outputs = norm._outputs(x, residual)
    made = _empty_made(outputs[0], chosen, turned)
    if x.numel() or recording():
        y, h, *statistics = outputs
        held = [None if t.shape[0] == 0 else t for t in made]
        maxima = None if held[2] is None else held[2].view(torch.int32)
        start_forward(
            _forward_kernel, x, residual, [*parameters, None][:2],
            (y, h, *([None] if rms else []), *statistics, held[0], held[1], maxima),
            own[0], *(own[1:] or (0.0,)), made.codes.shape[1] if made.codes.dim() == 2 else 0,
            RMS=rms, **encoding(x, chosen.forward, chosen),
        )  # fmt: skip
    return *outputs, *made


def _fake(norm: Any, x: Tensor, residual: Tensor | None, recipe: str, turned: bool) -> tuple[Tensor, ...]:
    outputs = norm._outputs(x, residual)
    return *outputs, *_empty_made(outputs[0], Recipe.parse(recipe), turned)


_rms_forward = define(
    "add_rms_norm_fp8_forward(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset,"
    " str recipe, bool turned)"
    " -> (Tensor y, Tensor h, Tensor rstd, Tensor codes, Tensor inverse, Tensor maxima)",
    lambda x, residual, weight, eps, offset, *rest: _run(
        add_rms_norm, x, residual, [weight], (eps, offset), *rest
    ),
    lambda x, residual, weight, eps, offset, *rest: _fake(add_rms_norm, x, residual, *rest),
)
_layer_forward = define(
    "add_layer_norm_fp8_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps,"
    " str recipe, bool turned)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd, Tensor codes, Tensor inverse, Tensor maxima)",
    lambda x, residual, weight, bias, eps, *rest: _run(
        add_layer_norm, x, residual, [weight, bias], (eps,), *rest
    ),
    lambda x, residual, weight, bias, eps, *rest: _fake(add_layer_norm, x, residual, *rest),
)


class _AddRMSNormFp8(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        offset: float,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        y, h, rstd, *made = _rms_forward(x, residual, weight, eps, offset, *rest)
        ctx.save_for_backward(x if residual is None else h, rstd, weight)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([h] if residual is None else []), *made)
        return y, h, *made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *add_rms_norm.gradients(ctx, *grads[:2]), None, None


class _AddLayerNormFp8(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
        *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        y, h, mean, rstd, *made = _layer_forward(x, residual, weight, bias, eps, *rest)
        ctx.save_for_backward(x if residual is None else h, mean, rstd, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([h] if residual is None else []), *made)
        return y, h, *made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *add_layer_norm.gradients(ctx, *grads[:2]), None, None


def _checked(norm: Any, *args: Any) -> tuple[Any, ...]:
    *own, recipe, _ = args
    reason = norm.supports(*own) or why_not(args[0], Recipe.parse(recipe))
    if reason is not None:
        raise ValueError(f"{norm.__name__.rsplit('.', 1)[-1]}_fp8: {reason}")
    return args


def _infer(norm: Any, forward: Any, *args: Any) -> tuple[Tensor, ...]:
    results = forward(*_checked(norm, *args))
    return *results[:2], *results[-3:]


_RESULTS = " -> (Tensor y, Tensor h, Tensor codes, Tensor inverse, Tensor maxima)"

# turned: fp8_operand will make the second layout.
add_rms_norm_fp8 = define(
    "add_rms_norm_fp8(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset, str recipe,"
    " bool turned)" + _RESULTS,
    lambda *args: _infer(add_rms_norm, _rms_forward, *args),
    lambda *args: _infer(add_rms_norm, _rms_forward, *args),
    autograd=lambda *args: _AddRMSNormFp8.apply(*_checked(add_rms_norm, *args)),
)
add_layer_norm_fp8 = define(
    "add_layer_norm_fp8(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, str recipe,"
    " bool turned)" + _RESULTS,
    lambda *args: _infer(add_layer_norm, _layer_forward, *args),
    lambda *args: _infer(add_layer_norm, _layer_forward, *args),
    autograd=lambda *args: _AddLayerNormFp8.apply(*_checked(add_layer_norm, *args)),
)
WITH_CODES = {add_rms_norm.fused: add_rms_norm_fp8, add_layer_norm.fused: add_layer_norm_fp8}
