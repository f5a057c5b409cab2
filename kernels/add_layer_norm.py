r"""LayerNorm of a residual sum, in one pass over memory.

    h = x + residual                                   (rounded to x's dtype, as eager rounds it)
    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

Ba, Kiros & Hinton 2016, "Layer Normalization", arXiv:1607.06450.
Saved for backward: h (x where there is no residual), weight, and two float32 numbers a row, mean and rstd.
With a = (h - mean) * rstd and g = dy * weight:
    dx = dresidual = dh + rstd * (g - mean(g) - a * mean(g * a)),  dweight = sum of dy * a,  dbias = sum of dy
where dh is the gradient that reaches h from its other readers. One pass over h, dy and dh makes all of them;
the sums over rows leave one float32 partial row per program, added up by a second small kernel.
Shape suffixes: M rows (tokens), N columns (features), P programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.kernels import norm_cpu
from fusekit.kernels._triton import tl, triton
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.norm_launch import empty_grads, empty_outputs, start_backward, start_forward
from fusekit.kernels.op import Op, Sample, not_runnable
from fusekit.kernels.row_reduction import (
    Draw,
    unsupported_parameter,
    unsupported_rows,
)


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """y, and h or an empty tensor where there is no residual. x (..., N), weight and bias (N,)."""
    h = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (None if p is None else p.to(wide) for p in (weight, bias))
    y = F.layer_norm(h.to(wide), x.shape[-1:], scale, shift, eps).to(x.dtype)
    return y, x.new_empty(0) if residual is None else h


@triton.jit
def normalised_rows(
    x_ptr, residual_ptr, h_ptr, mean_ptr, rstd_ptr, x_stride, residual_stride, row, column, weight, bias,
    M, N, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y of these rows in float32; stores h, mean and rstd."""
    inside = (row < M)[:, None] & (column < N)
    wide_row = row.to(tl.int64)[:, None]  # row * stride may pass 2^31
    h = tl.load(x_ptr + wide_row * x_stride + column, mask=inside, other=0.0)
    if residual_ptr is not None:
        r = tl.load(residual_ptr + wide_row * residual_stride + column, mask=inside, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h.dtype)
        tl.store(h_ptr + wide_row * N + column, h, mask=inside)
    h = h.to(tl.float32)
    mean = tl.sum(h, 1) / N
    centred = tl.where(column < N, h - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / N + eps))
    tl.store(mean_ptr + row, mean, mask=row < M)
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    y = centred * rstd[:, None]
    if WEIGHT:
        y *= weight
    if BIAS:
        y += bias
    return y


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, M, N, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_N)[None, :]
    weight = 1.0
    bias = 0.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        y = normalised_rows(
            x_ptr, residual_ptr, h_ptr, mean_ptr, rstd_ptr, x_stride, residual_stride, row, column, weight,
            bias, M, N, eps, weight_ptr is not None, bias_ptr is not None,
        )  # fmt: skip
        inside = (row < M)[:, None] & (column < N)
        tl.store(y_ptr + row.to(tl.int64)[:, None] * N + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr, dh_ptr, h_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    dy_stride, dh_stride, h_stride, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_N)[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row < M)[:, None] & (column < N)
        wide_row = row.to(tl.int64)[:, None]
        h = tl.load(h_ptr + wide_row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        a = (h - mean[:, None]) * rstd[:, None]  # not zero beyond N, but there dy is
        if dweight_ptr is not None:
            dweight += dy * a
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            g = dy
            if weight_ptr is not None:
                g = dy * weight
            dx = rstd[:, None] * (g - (tl.sum(g, 1) / N)[:, None] - a * (tl.sum(g * a, 1) / N)[:, None])
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + wide_row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + wide_row * N + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    partial = tl.program_id(0).to(tl.int64) * N + tl.arange(0, BLOCK_N)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK_N) < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=tl.arange(0, BLOCK_N) < N)


def _forward_gpu(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, h, mean, rstd = _outputs(x, residual)
    start_forward(_forward_kernel, x, residual, (weight, bias), (y, h, mean, rstd), eps)
    return y, h, mean, rstd


def _backward_gpu(
    dy: Tensor, dh: Tensor | None, h: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _grads(h, weight, bias, needed)
    wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    start_backward(_backward_kernel, dy, dh, h, (mean, rstd), weight, wanted)
    return grads


def _forward_native(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = (x if residual is None else x + residual).contiguous()
    # A float32 weight makes ATen keep the row statistics in float32; else they are rounded, and dx with them.
    scale = h.new_ones(h.shape[-1:], dtype=torch.float32) if weight is None else weight.float()
    shift = None if bias is None else bias.float()
    y, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], scale, shift, eps)
    return y, x.new_empty(0) if residual is None else h, mean.view(-1), rstd.view(-1)


def _backward_native(
    dy: Tensor, dh: Tensor | None, h: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    N = h.shape[-1]
    scale = h.new_ones(N, dtype=torch.float32) if weight is None else weight.float()
    if h.dtype == torch.float32:
        statistics = [t.view(*h.shape[:-1], 1) for t in (mean, rstd)]
        dx, *sums = norm_cpu.aten_layer_norm_backward(dy, h, (N,), *statistics, scale, scale, needed)
        if dx is not None and dh is not None:
            dx += dh
    elif norm_cpu.takes(h):
        dx, *sums = norm_cpu.backward(dy, dh, h, mean, rstd, scale, needed)
    else:
        dx, *sums = norm_cpu.layer_norm_backward_widened(dy, dh, h, mean, rstd, scale, needed)
    for i, parameter in enumerate((weight, bias)):
        if sums[i] is not None and parameter is not None:
            sums[i] = sums[i].to(parameter.dtype)
    dx, dweight, dbias = (h.new_empty(0) if t is None else t for t in (dx, *sums))
    return dx, dweight, dbias


def _outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, h, mean, rstd = empty_outputs(x, residual, 2)
    return y, h, mean, rstd


def _grads(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = empty_grads(h, (weight, bias), needed)
    return dx, dweight, dbias


def _checked(*args: Any) -> tuple[Any, ...]:
    if reason := supports(*args):
        raise ValueError(f"add_layer_norm: {reason}")
    return args


def _run_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (_forward_gpu if on_gpu(x) else _forward_native)(x, *args)


def _run_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (_backward_gpu if on_gpu(dy) else _backward_native)(dy, *args)


_forward = define(
    "add_layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    _run_forward,
    lambda x, residual, weight, bias, eps: _outputs(x, residual),
    check=_checked,
)
_backward = define(
    "add_layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor mean, Tensor rstd, Tensor? weight,"
    " Tensor? bias, bool[3] needed) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _run_backward,
    lambda dy, dh, h, mean, rstd, weight, bias, needed: _grads(h, weight, bias, needed),
)


class _AddLayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, h, mean, rstd = _forward(x, residual, weight, bias, eps)
        ctx.save_for_backward(x if residual is None else h, mean, rstd, weight, bias)
        ctx.set_materialize_grads(False)
        if residual is None:
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return gradients(ctx, *grad_outputs)


def gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, residual, weight, bias and eps."""
    refuse_double_backward("add_layer_norm")
    x_needed, residual_needed, weight_needed, bias_needed = ctx.needs_input_grad[:4]
    if dy is None:  # only the sum was used
        return dh if x_needed else None, dh if residual_needed else None, None, None, None
    needed = [x_needed or residual_needed, weight_needed, bias_needed]
    dx, dweight, dbias = _backward(dy, dh, *ctx.saved_tensors, needed)
    return (
        dx if x_needed else None,
        dx if residual_needed else None,  # one tensor twice, as the backward of aten's add returns it
        dweight if weight_needed else None,
        dbias if bias_needed else None,
        None,
    )


def supports(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    """None, or why this call cannot be fused, as a sentence."""
    reason = not_runnable(x, residual, weight, bias) or unsupported_rows(x, residual, weight)
    return reason or (None if bias is None else unsupported_parameter(x, "bias", bias))


fused = define(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor h)",
    lambda *args: _forward(*args)[:2],
    lambda *args: _outputs(*_checked(*args)[:2])[:2],
    autograd=_AddLayerNorm.apply,
)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Small odd ones, strided, with parts absent, empty; then the width of a small GPT and of an 8B Llama."""
    draw = Draw(device, dtype)

    def sample(name: str, x: Tensor, residual: Any, weight: Any, bias: Any, bench: bool = False) -> Sample:
        return Sample(args=(x, residual, weight, bias, 1e-5), name=name, bench=bench)

    yield sample("residual", draw(3, 7, 257), draw(3, 7, 257), draw(257, shift=1), draw(257))
    yield sample("no residual", draw(37, 96, shift=2), None, draw(96), draw(96))
    yield sample("no weight, no bias", draw(5, 1000), draw(5, 1000), None, None)
    yield sample("no bias", draw(9, 64), None, draw(64), None)
    yield sample("strided", draw.strided(6, 3, 130), draw.strided(6, 3, 130), draw(130), draw(130))
    wide = draw(2100, dtype=torch.float32), draw(2100, dtype=torch.float32)
    yield sample("float32 weight", draw(4, 2100), draw(4, 2100), *wide)
    yield sample("empty", draw(0, 48), draw(0, 48), draw(48), draw(48))
    for M, N in (2048, 384), (8192, 4096):
        yield sample(f"{M}x{N}", draw(M, N), draw(M, N), draw(N, shift=1), draw(N), bench=True)


def flops(x: Tensor, residual: Tensor | None, *args: Any) -> int:
    """Mean 1, centring 1, variance 2, scale 1, weight and bias 2; the residual 1."""
    return x.numel() * (7 if residual is None else 8)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent=True)
