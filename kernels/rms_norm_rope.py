r"""RMSNorm over a head's features, then rotary position embedding: QK-norm, in one pass over memory.

    z = x / sqrt(mean(x^2) + eps) * (weight + offset),   y = R z         (rounded once, at the end)

QK-norm: Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", arXiv:2302.05442.
Rotation: Su et al. 2021, "RoFormer", arXiv:2104.09864. Saved for backward: x, weight and the tables; rstd is
computed again, the row is read anyway. With g = R(-angle) dy and a = x rstd:
    dx = rstd (g w - a mean(g w a)),  w = weight + offset,      dweight = sum over rows of g a
the sum by one float32 partial row a program, added up in order by a second small kernel.
Shapes: x (..., D), any strides; weight (D,); cos, sin as in rope.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.op import Op, Sample
from fusekit.kernels.rope import tables
from fusekit.kernels.rotation import (
    dense_like,
    norm_backward_gpu,
    rotate_gpu,
    rotated,
    turned_features,
    unsupported,
)
from fusekit.kernels.rotation_cpu import chunks, rotate
from fusekit.kernels.row_reduction import Draw, unsupported_parameter


def reference(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float,
    offset: float = 0.0, interleaved: bool = False, rotary: int | None = None,
) -> Tensor:  # fmt: skip
    """x normalised over its last dimension, then turned; arguments as in rope.reference."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    z = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        z = z * (weight.to(z.dtype) + offset)
    return rotated(z, cos, sin, turned_features(cos, rotary), interleaved).to(x.dtype)


def _forward_native(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, offset: float,
    interleaved: bool, rotary: int, y: Tensor,
) -> None:  # fmt: skip
    scale = None if weight is None else weight.float() + offset
    for x_rows, cos_rows, sin_rows, y_rows in chunks(x, cos.float(), sin.float(), y):
        wide = x_rows.float()
        z = wide * _rstd(wide, eps)
        if scale is not None:
            z *= scale
        out = y_rows if y.dtype == torch.float32 else torch.empty_like(z)
        rotate(z, cos_rows, sin_rows, out, rotary, interleaved)
        if out is not y_rows:
            y_rows.copy_(out)


def _backward_native(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, dx: Tensor | None,
    dweight: Tensor | None, rotary: int, interleaved: bool, eps: float, offset: float,
) -> None:  # fmt: skip
    D = x.shape[-1]
    scale = None if weight is None else weight.float() + offset
    total = x.new_zeros(D, dtype=torch.float32)
    own = x if dx is None else dx
    for x_rows, dy_rows, cos_rows, sin_rows, dx_rows in chunks(x, dy, cos.float(), sin.float(), own):
        wide = x_rows.float()
        rstd = _rstd(wide, eps)
        a, g = wide * rstd, torch.empty_like(wide)
        rotate(dy_rows.float(), cos_rows, sin_rows, g, rotary, interleaved, back=True)
        product = g * a
        if dweight is not None:
            total += product.sum((0, 1, 2))
        if dx is not None:
            mean = (product if scale is None else product.mul_(scale)).mean(-1, keepdim=True)
            if scale is not None:
                g *= scale
            dx_rows.copy_(g.addcmul_(a, mean, value=-1).mul_(rstd))
    if dweight is not None:
        dweight.copy_(total)


def _rstd(wide: Tensor, eps: float) -> Tensor:
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    return squares.div_(wide.shape[-1]).add_(eps).rsqrt_()


def _forward(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, offset: float,
    interleaved: bool, rotary: int,
) -> Tensor:  # fmt: skip
    y = dense_like(x)
    if on_gpu(x):
        rotate_gpu(x, cos, sin, y, rotary, interleaved, norm=(weight, eps, offset))
    else:
        _forward_native(x, weight, cos, sin, eps, offset, interleaved, rotary, y)
    return y


def _grads(x: Tensor, weight: Tensor | None, needed: list[bool]) -> tuple[Tensor, Tensor]:
    """Uninitialised gradients; an empty tensor where one is not needed."""
    dx = dense_like(x) if needed[0] else x.new_empty(0)
    if weight is None or not needed[1]:
        return dx, x.new_empty(0)
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, offset: float,
    interleaved: bool, rotary: int, needed: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grads = _grads(x, weight, needed)
    dx, dweight = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    run = norm_backward_gpu if on_gpu(x) else _backward_native
    run(dy, x, cos, sin, weight, dx, dweight, rotary, interleaved, eps, offset)
    return grads


def _check(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, *settings: Any) -> None:
    if reason := supports(x, weight, cos, sin, *settings):
        raise ValueError(f"rms_norm_rope: {reason}")


_SETTINGS = "Tensor? weight, Tensor cos, Tensor sin, float eps, float offset, bool interleaved, int rotary"
_forward_op = define(
    f"rms_norm_rope_forward(Tensor x, {_SETTINGS}) -> Tensor",
    _forward,
    lambda x, *rest: dense_like(x),
    check=_check,
    depends=lambda x, weight, cos, sin, *_: cos.requires_grad or sin.requires_grad,
)
_backward_op = define(
    f"rms_norm_rope_backward(Tensor dy, Tensor x, {_SETTINGS}, bool[2] needed)"
    " -> (Tensor dx, Tensor dweight)",
    _backward,
    lambda dy, x, weight, *rest: _grads(x, weight, rest[-1]),
)


class _RMSNormRope(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, *settings: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.settings = settings
        return _forward_op(x, weight, cos, sin, *settings)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward("rms_norm_rope")
        needed = list(ctx.needs_input_grad[:2])
        grads = _backward_op(grad_output, *ctx.saved_tensors, *ctx.settings, needed)
        dx, dweight = (g if need else None for g, need in zip(grads, needed, strict=True))
        return dx, dweight, None, None, None, None, None, None


def _arguments(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float,
    offset: float = 0.0, interleaved: bool = False, rotary: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    return x, weight, cos, sin, eps, offset, interleaved, turned_features(cos, rotary)


def _fake(*args: Any) -> Tensor:
    args = _arguments(*args)
    _check(*args)
    return dense_like(args[0])


def supports(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float,
    offset: float = 0.0, interleaved: bool = False, rotary: int | None = None,
) -> str | None:  # fmt: skip
    """None, or why this call cannot be fused, as a sentence."""
    reason = unsupported(x, cos, sin, rotary, weight)
    return reason or (None if weight is None else unsupported_parameter(x, "weight", weight))


fused = define(
    "rms_norm_rope(Tensor x, Tensor? weight, Tensor cos, Tensor sin, float eps, float offset=0.0,"
    " bool interleaved=False, int? rotary=None) -> Tensor",
    lambda *args: _forward_op(*_arguments(*args)),
    _fake,
    autograd=lambda *args: _RMSNormRope.apply(*_arguments(*args)),
)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """As those of rope, with weights; then the heads of a Qwen3 0.6B and 8B."""
    draw = Draw(device, dtype)

    def heads(B: int, T: int, H: int, D: int) -> Tensor:
        return draw(B, T, H, D).detach().transpose(1, 2).requires_grad_()

    halves = tables(device, dtype, 37, 64, "halves")
    yield Sample(args=(heads(2, 37, 3, 64), draw(64, shift=1), *halves, 1e-6), name="halves")
    pairs = tables(device, dtype, 23, 40, "pairs")
    yield Sample(args=(heads(2, 23, 3, 40), draw(40), *pairs, 1e-5, 0.0, True), name="interleaved")
    single = tables(device, torch.float32, 19, 12)
    wide = draw(24, dtype=torch.float32)
    yield Sample(args=(heads(1, 19, 4, 24), wide, *single, 1e-6, 0.0, False, 24), name="half table, float32")
    turned = tables(device, dtype, 15, 20, "halves")
    yield Sample(args=(heads(2, 15, 2, 80), draw(80), *turned, 1e-6, 1.0), name="partial, offset 1 (Gemma)")
    partial = tables(device, dtype, 9, 3)
    yield Sample(args=(heads(3, 9, 2, 10), None, *partial, 1e-6, 0.0, True, 6), name="no weight, partial")
    packed = draw(2, 13, 3, 3 * 32).detach()[..., 32:64].transpose(1, 2).requires_grad_()
    each = tuple(draw(2, 1, 13, 32).detach() for _ in range(2))
    yield Sample(args=(packed, draw(32, shift=1), *each, 1e-6), name="packed, own tables")
    empty = tables(device, dtype, 5, 16, "halves")
    yield Sample(args=(heads(0, 5, 2, 16), draw(16), *empty, 1e-6), name="empty")
    for B, T, H, D in (8, 256, 6, 64), (4, 2048, 32, 128):
        table = tables(device, dtype, T, D, "halves")
        x, weight = heads(B, T, H, D), draw(D, shift=1)
        yield Sample(args=(x, weight, *table, 1e-6), name=f"{B}x{T}x{H}x{D}", bench=True)


def flops(x: Tensor, *args: Any) -> int:
    """Sum of squares 2, scale 1, weight 1, rotation 3."""
    return 7 * x.numel()


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops)
