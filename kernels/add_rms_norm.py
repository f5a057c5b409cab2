r"""RMSNorm of a residual sum, in one pass over memory.

    h = x + residual                                   (rounded to x's dtype, as eager rounds it)
    y = h / sqrt(mean(h^2) + eps) * (weight + offset)  (rounded once, at the end; Gemma's offset is 1)

Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.
Saved for backward: h (x where there is no residual), weight, and one float32 number a row, rstd.
With a = h * rstd and g = dy * (weight + offset):
    dx = dresidual = dh + rstd * (g - a * mean(g * a)),   dweight = sum of dy * a
where dh is the gradient that reaches h from its other readers. One pass over h, dy and dh makes both; the sum
over rows leaves one float32 partial row per program, added up by a second small kernel.
Shape suffixes: M rows (tokens), N columns (features), P programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import norm_cpu
from fusekit.kernels._triton import tl, triton
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.norm_launch import empty_grads, empty_outputs, start_backward, start_forward
from fusekit.kernels.op import Op, Sample, not_runnable
from fusekit.kernels.row_reduction import (
    Draw,
    row_chunks,
    unsupported_rows,
    widened,
)


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """y, and h or an empty tensor where there is no residual. x (..., N), weight (N,)."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    return y.to(x.dtype), x.new_empty(0) if residual is None else h


@triton.jit
def normalised_rows(
    x_ptr, residual_ptr, h_ptr, rstd_ptr, x_stride, residual_stride, row, column, weight, M, N, eps,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """y of these rows in float32; stores h and rstd."""
    inside = (row < M)[:, None] & (column < N)
    wide_row = row.to(tl.int64)[:, None]  # row * stride may pass 2^31
    h = tl.load(x_ptr + wide_row * x_stride + column, mask=inside, other=0.0)
    if residual_ptr is not None:
        r = tl.load(residual_ptr + wide_row * residual_stride + column, mask=inside, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h.dtype)
        tl.store(h_ptr + wide_row * N + column, h, mask=inside)
    h = h.to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, 1) / N + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    y = h * rstd[:, None]
    if WEIGHT:
        y *= weight
    return y


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr,
    x_stride, residual_stride, M, N, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_N)[None, :]
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32) + offset
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        y = normalised_rows(
            x_ptr, residual_ptr, h_ptr, rstd_ptr, x_stride, residual_stride, row, column, weight, M, N, eps,
            weight_ptr is not None,
        )  # fmt: skip
        inside = (row < M)[:, None] & (column < N)
        tl.store(y_ptr + row.to(tl.int64)[:, None] * N + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr, dh_ptr, h_ptr, rstd_ptr, weight_ptr, dx_ptr, dweight_ptr,
    dy_stride, dh_stride, h_stride, M, N, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_N)[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row < M)[:, None] & (column < N)
        wide_row = row.to(tl.int64)[:, None]
        h = tl.load(h_ptr + wide_row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        a = h * rstd[:, None]
        if dweight_ptr is not None:
            dweight += dy * a
        if dx_ptr is not None:
            g = dy
            if weight_ptr is not None:
                g = dy * weight
            dx = rstd[:, None] * (g - a * (tl.sum(g * a, 1) / N)[:, None])
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + wide_row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + wide_row * N + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dweight_ptr is not None:
        partial = tl.program_id(0).to(tl.int64) * N + tl.arange(0, BLOCK_N)
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK_N) < N)


def _forward_gpu(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, rstd = _outputs(x, residual)
    start_forward(_forward_kernel, x, residual, (weight,), (y, h, rstd), eps, offset)
    return y, h, rstd


def _backward_gpu(
    dy: Tensor, dh: Tensor | None, h: Tensor, rstd: Tensor,
    weight: Tensor | None, offset: float, needed: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grads = _grads(h, weight, needed)
    wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    start_backward(_backward_kernel, dy, dh, h, (rstd,), weight, wanted, offset)
    return grads


def _forward_native(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, rstd = _outputs(x, residual)
    N = x.shape[-1]
    summed = (x if residual is None else torch.add(x, residual, out=h)).reshape(-1, N)
    scale = None if weight is None else weight.float() + offset
    buffers: tuple[Tensor, ...] = ()
    for h_rows, y_rows, rstd_rows in row_chunks(summed, y.view(-1, N), rstd[:, None]):
        buffers = buffers or tuple(torch.empty_like(h_rows, dtype=torch.float32) for _ in range(2))
        wide = widened(h_rows, buffers[1])
        out = y_rows if y.dtype == torch.float32 else buffers[0][: len(y_rows)]
        squares = torch.mul(wide, wide, out=out)
        torch.add(squares.mean(1, keepdim=True), eps, out=rstd_rows).rsqrt_()
        torch.mul(wide, rstd_rows, out=out)
        if scale is not None:
            out *= scale
        if out is not y_rows:
            y_rows.copy_(out)
    return y, h, rstd


def _backward_native(
    dy: Tensor, dh: Tensor | None, h: Tensor, rstd: Tensor,
    weight: Tensor | None, offset: float, needed: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grads = _grads(h, weight, needed)
    N = h.shape[-1]
    scale = None if weight is None else weight.float() + offset
    if norm_cpu.takes(h):
        ones = h.new_ones(N, dtype=torch.float32) if scale is None else scale
        dx, of_weight, _ = norm_cpu.backward(dy, dh, h, None, rstd, ones, [*needed, False])
        return (
            grads[0] if dx is None else dx,
            grads[1] if of_weight is None or weight is None else of_weight.to(weight.dtype),
        )
    total = h.new_zeros(N, dtype=torch.float32)
    rows = (None if t is None else t.reshape(-1, N) for t in (h, dy, dh, grads[0] if needed[0] else None))
    buffers: tuple[Tensor, ...] = ()
    for h_rows, dy_rows, dh_rows, dx_rows, rstd_rows in row_chunks(*rows, rstd[:, None]):
        buffers = buffers or tuple(torch.empty_like(h_rows, dtype=torch.float32) for _ in range(3))
        a, wide_dy, dy_a = (buffer[: len(h_rows)] for buffer in buffers)
        torch.mul(widened(h_rows, a), rstd_rows, out=a)
        wide_dy = widened(dy_rows, wide_dy)
        torch.mul(wide_dy, a, out=dy_a)
        if needed[1]:
            total += dy_a.sum(0)
        if dx_rows is not None:
            mean = dy_a.mean(1) if scale is None else torch.mv(dy_a, scale / N)
            g = wide_dy if scale is None else torch.mul(wide_dy, scale, out=dy_a)
            dx = torch.addcmul(g, a, mean[:, None], value=-1, out=a).mul_(rstd_rows)
            dx_rows.copy_(dx if dh_rows is None else dx.add_(widened(dh_rows, dy_a)))
    if needed[1]:
        grads[1].copy_(total)
    return grads


def _outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    y, h, rstd = empty_outputs(x, residual, 1)
    return y, h, rstd


def _grads(h: Tensor, weight: Tensor | None, needed: list[bool]) -> tuple[Tensor, Tensor]:
    dx, dweight = empty_grads(h, (weight,), needed)
    return dx, dweight


def _run_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (_forward_gpu if on_gpu(x) else _forward_native)(x, *args)


def _run_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return (_backward_gpu if on_gpu(dy) else _backward_native)(dy, *args)


def _checked(*args: Any) -> tuple[Any, ...]:
    if reason := supports(*args):
        raise ValueError(f"add_rms_norm: {reason}")
    return args


_forward = define(
    "add_rms_norm_forward(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
    _run_forward,
    lambda x, residual, weight, eps, offset: _outputs(x, residual),
    check=_checked,
)
_backward = define(
    "add_rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor rstd, Tensor? weight, float offset,"
    " bool[2] needed) -> (Tensor dx, Tensor dweight)",
    _run_backward,
    lambda dy, dh, h, rstd, weight, offset, needed: _grads(h, weight, needed),
)


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        y, h, rstd = _forward(x, residual, weight, eps, offset)
        ctx.save_for_backward(x if residual is None else h, rstd, weight)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        if residual is None:
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return gradients(ctx, *grad_outputs)


def gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, residual, weight, eps and offset."""
    refuse_double_backward("add_rms_norm")
    x_needed, residual_needed, weight_needed = ctx.needs_input_grad[:3]
    if dy is None:  # only the sum was used
        return dh if x_needed else None, dh if residual_needed else None, None, None, None
    needed = [x_needed or residual_needed, weight_needed]
    dx, dweight = _backward(dy, dh, *ctx.saved_tensors, ctx.offset, needed)
    return (
        dx if x_needed else None,
        dx if residual_needed else None,  # one tensor twice, as the backward of aten's add returns it
        dweight if weight_needed else None,
        None,
        None,
    )


def supports(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float = 0.0
) -> str | None:
    """None, or why this call cannot be fused, as a sentence."""
    return not_runnable(x, residual, weight) or unsupported_rows(x, residual, weight)


fused = define(
    "add_rms_norm(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset=0.0)"
    " -> (Tensor y, Tensor h)",
    lambda x, residual, weight, eps, offset=0.0: _forward(x, residual, weight, eps, offset)[:2],
    lambda *args: _outputs(*_checked(*args)[:2])[:2],
    autograd=lambda x, residual, weight, eps, offset=0.0: _AddRMSNorm.apply(x, residual, weight, eps, offset),
)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Small odd ones, strided, with parts absent, empty; then the width of a small GPT and of an 8B Llama."""
    draw = Draw(device, dtype)
    yield Sample(args=(draw(3, 7, 257), draw(3, 7, 257), draw(257, shift=1), 1e-6), name="residual")
    yield Sample(args=(draw(37, 96, shift=2), None, draw(96), 1e-5), name="no residual")
    yield Sample(args=(draw(5, 1000), draw(5, 1000), None, 1e-6), name="no weight")
    yield Sample(args=(draw(9, 64), None, draw(64), 1e-6, 1.0), name="offset 1 (Gemma)")
    yield Sample(args=(draw.strided(6, 3, 130), draw.strided(6, 3, 130), draw(130), 1e-6), name="strided")
    wide = draw(2100, dtype=torch.float32)
    yield Sample(args=(draw(4, 2100), draw(4, 2100), wide, 1e-6), name="float32 weight")
    yield Sample(args=(draw(0, 48), draw(0, 48), draw(48), 1e-6), name="empty")
    for M, N in (2048, 384), (8192, 4096):
        yield Sample(args=(draw(M, N), draw(M, N), draw(N, shift=1), 1e-6), name=f"{M}x{N}", bench=True)


def flops(x: Tensor, residual: Tensor | None, *args: Any) -> int:
    """Sum of squares 2, scale 1, weight 1; the residual 1."""
    return x.numel() * (4 if residual is None else 5)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent=True)
