r"""Three linear layers of one input as one op: the projections in front of attention.

    q = x @ w_q.T + b_q,   k = x @ w_k.T + b_k,   v = x @ w_v.T + b_v

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762; k and v may be narrower, as in
grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245. The weights stay three tensors: nothing is
concatenated.

M rows (tokens), K input features, N = N_q + N_k + N_v output features; e bytes an element.
Saved for backward: x and the weights, as three layers save them.

Forward, GPU: one launch (qkv_kernels.py). It reads x once, (MK + NK + MN) e, where three layers read it three
times. Backward: grad_x = dq @ w_q + dk @ w_k + dv @ w_v is one product with one accumulator, MK e written;
three layers write three products, and two sums read and write them again, 9 MK e. It is rounded once. The
weights' gradients are three products, on which the biases' ride as partial sums (linear_gpu.py).

CPU: three products, and grad_x summed in one float32 accumulator; 16-bit values are widened, where they are,
once for all three. That takes about as long as three layers, so price.py leaves those alone on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.linear_act import _rows, _shape
from fusekit.kernels.linear_cpu import mixes, multiplies
from fusekit.kernels.linear_gpu import asks_tf32, use_tf32, weight_gradients
from fusekit.kernels.op import Op, Sample, not_runnable
from fusekit.kernels.qkv_gemm import project, sum_products

Three = list[Tensor]
Biases = list[Tensor | None]
BLOCK_ROWS = 1024  # of x that a CPU widens at once


def reference(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch; accumulates in at least float32 and rounds once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.nn.functional.linear(rows, weight.to(wide), None if bias is None else bias.to(wide))
        return y.to(x.dtype)

    return linear(w_q, b_q), linear(w_k, b_k), linear(w_v, b_v)


def _forward_cpu(x: Tensor, weights: Three, biases: Biases, outputs: Three) -> None:
    if multiplies(x.dtype):
        for weight, bias, output in zip(weights, biases, outputs, strict=True):
            _affine(x, weight, bias, output)
        return
    weights = [weight.float() for weight in weights]
    biases = [None if bias is None else bias.float() for bias in biases]
    for start in range(0, x.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        wide = x[rows].float()
        for weight, bias, output in zip(weights, biases, outputs, strict=True):
            output[rows] = _affine(wide, weight, bias)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _backward_cpu(
    grads: Three,
    x: Tensor | None,
    weights: Three,
    grad_x: Tensor | None,
    grad_weights: Biases,
    grad_biases: Biases,
) -> None:
    widened = not multiplies(grads[0].dtype)
    if grad_x is not None:
        if widened or grad_x.dtype == torch.float32:
            _sum_products_cpu(grads, weights, grad_x)
        else:  # products of their own would each be rounded; the copies are small beside the product
            torch.mm(torch.cat(grads, 1), torch.cat(weights), out=grad_x)
    wide = x.float() if widened and x is not None and any(g is not None for g in grad_weights) else x
    for grad, grad_weight, grad_bias in zip(grads, grad_weights, grad_biases, strict=True):
        if grad_weight is not None and wide is not None:
            grad_weight.copy_(torch.mm(grad.to(wide.dtype).t(), wide))
        if grad_bias is not None:
            grad_bias.copy_(grad.sum(0, dtype=torch.float32))


def _sum_products_cpu(grads: Three, weights: Three, grad_x: Tensor) -> None:
    """One float32 accumulator for the three, a block of rows at a time."""
    weights = [weight.float() for weight in weights]
    for start in range(0, grad_x.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        in_place = grad_x.dtype == torch.float32
        total = grad_x[rows] if in_place else grad_x.new_empty(grad_x[rows].shape, dtype=torch.float32)
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            total.addmm_(grad[rows].float(), weight, beta=1 if i else 0)
        if not in_place:
            grad_x[rows] = total


def _forward_triton(x: Tensor, weights: Three, biases: Biases, outputs: Three, tf32: bool) -> None:
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    project(x, weights, biases, outputs, use_tf32(x, tf32))


def _backward_triton(
    grads: Three,
    x: Tensor | None,
    weights: Three,
    tf32: bool,
    grad_x: Tensor | None,
    grad_weights: Biases,
    grad_biases: Biases,
) -> None:
    grads = [grad if grad.stride(1) == 1 else grad.contiguous() for grad in grads]
    tf32 = use_tf32(grads[0], tf32)
    if grad_x is not None:
        sum_products(grads, weights, grad_x, tf32)
    for grad, grad_weight, grad_bias in zip(grads, grad_weights, grad_biases, strict=True):
        weight_gradients(grad, x, grad_weight, grad_bias, tf32)


def _empty_forward(x: Tensor, weights: Three, biases: Biases, tf32: bool) -> Three:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _forward(x: Tensor, weights: Three, biases: Biases, tf32: bool) -> Three:
    outputs = _empty_forward(x, weights, biases, tf32)
    rows = [_rows(output) for output in outputs]
    if on_gpu(x):
        _forward_triton(_rows(x), weights, biases, rows, tf32)
    else:
        _forward_cpu(_rows(x), weights, biases, rows)
    return outputs


def _empty_backward(
    grads: Three, x: Tensor | None, weights: Three, tf32: bool, needs: list[bool]
) -> list[Tensor]:
    """Of x, the weights with their strides, and the biases; empty where `needs` says no."""
    shape = (*grads[0].shape[:-1], weights[0].shape[1])
    made = [grads[0].new_empty(shape if needs[0] else (0,))]
    made += [
        torch.empty_like(w) if need else w.new_empty((0,))
        for w, need in zip(weights, needs[1:4], strict=True)
    ]
    return made + [
        w.new_empty((w.shape[0] if need else 0,)) for w, need in zip(weights, needs[4:], strict=True)
    ]


def _backward(grads: Three, x: Tensor | None, weights: Three, tf32: bool, needs: list[bool]) -> list[Tensor]:
    made = _empty_backward(grads, x, weights, tf32, needs)
    grad_x, *others = [_rows(g) if i == 0 and need else g if need else None
                       for i, (g, need) in enumerate(zip(made, needs, strict=True))]  # fmt: skip
    rows = ([_rows(grad) for grad in grads], None if x is None else _rows(x), weights)
    if on_gpu(grads[0]):
        _backward_triton(*rows, tf32, grad_x, others[:3], others[3:])
    else:
        _backward_cpu(*rows, grad_x, others[:3], others[3:])
    return made


def _check(x: Tensor, weights: Three, biases: Biases, tf32: bool) -> None:
    (w_q, w_k, w_v), (b_q, b_k, b_v) = weights, biases
    reason = supports(x, w_q, w_k, w_v, b_q, b_k, b_v, tf32)
    if reason is not None:
        raise ValueError(f"qkv_linear: {reason}")


forward_op = define(
    "qkv_linear_forward(Tensor x, Tensor[] weights, Tensor?[] biases, bool tf32) -> Tensor[]",
    _forward,
    _empty_forward,
    check=_check,
    depends=asks_tf32,
)
backward_op = define(
    "qkv_linear_backward(Tensor[] grads, Tensor? x, Tensor[] weights, bool tf32, bool[] needs) -> Tensor[]",
    _backward,
    _empty_backward,
    depends=asks_tf32,
)


class _QkvLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        weights, biases, ctx.tf32 = list(rest[:3]), list(rest[3:6]), rest[6]
        ctx.needs = list(ctx.needs_input_grad[:7])
        ctx.save_for_backward(x if any(ctx.needs[1:4]) else None, *weights)
        return tuple(forward_op(x, weights, biases, ctx.tf32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        refuse_double_backward("qkv_linear")
        computed = backward_op(list(grads), x, weights, ctx.tf32, ctx.needs)
        return *(g if need else None for g, need in zip(computed, ctx.needs, strict=True)), None


def supports(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    tf32: bool = False,
) -> str | None:
    """None, or why qkv_linear does not run on these arguments."""
    if x.dim() == 0:
        return f"x {_shape(x)} needs a last dimension of features"
    named = (("w_q", w_q, "b_q", b_q), ("w_k", w_k, "b_k", b_k), ("w_v", w_v, "b_v", b_v))
    for name, weight, bias_name, bias in named:
        if weight.dim() != 2:
            return f"{name} {_shape(weight)} needs two dimensions, output and input features"
        if weight.shape[1] != x.shape[-1]:
            return f"x {_shape(x)} and {name} {_shape(weight)} differ in input features; {name} is (N, K)"
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
            return f"{bias_name} {_shape(bias)} is not ({weight.shape[0]},), one value per output feature"
    dtype = w_q.dtype if mixes(x, w_q) else x.dtype
    other = "x" if dtype == x.dtype else "w_q"
    for name, weight, bias_name, bias in named:
        for what, tensor in ((name, weight), (bias_name, bias)):
            if tensor is not None and tensor.dtype != dtype:
                return (
                    f"{other} is {dtype} and {what} is {tensor.dtype}; cast one, or call under torch.autocast"
                )
    return not_runnable(x, w_q, w_k, w_v, b_q, b_k, b_v)


def _arguments(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    tf32: bool = False,
) -> tuple[Any, ...]:
    return x, w_q, w_k, w_v, b_q, b_k, b_v, tf32


def _infer(*args: Any) -> tuple[Tensor, ...]:
    x, *rest = _arguments(*args)
    return tuple(forward_op(x, rest[:3], rest[3:6], rest[6]))


def _differentiable(*args: Any) -> tuple[Tensor, ...]:
    return _QkvLinear.apply(*_arguments(*args)) if torch.is_grad_enabled() else _infer(*args)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, *rest = _arguments(*args)
    _check(x, rest[:3], rest[3:6], rest[6])
    return tuple(_empty_forward(x, rest[:3], rest[3:6], rest[6]))


fused = define(
    "qkv_linear(Tensor x, Tensor w_q, Tensor w_k, Tensor w_v, Tensor? b_q=None, Tensor? b_k=None,"
    " Tensor? b_v=None, bool tf32=False) -> (Tensor, Tensor, Tensor)",
    _infer,
    _fake,
    autograd=_differentiable,
    autocast="lower",
)


def flops(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, *_: Any) -> int:
    return 2 * math.prod(x.shape) * (w_q.shape[0] + w_k.shape[0] + w_v.shape[0])


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Small: ragged, several blocks, grouped heads, some biases. bench: multi-head and grouped-query."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    def case(name: str, lead: tuple[int, ...], K: int, N: tuple[int, int, int], biased: str = "",
             bench: bool = False) -> Sample:  # fmt: skip
        weights = [make(n, K, scale=K**-0.5) for n in N]
        biases = [make(n) if letter in biased else None for n, letter in zip(N, "qkv", strict=True)]
        return Sample(args=(make(*lead, K), *weights, *biases), name=name, bench=bench)

    yield case("biases", (3, 43), 72, (80, 80, 80), "qkv")
    yield case("grouped", (131,), 64, (96, 24, 24))
    yield case("ragged", (2, 35), 37, (70, 33, 33), "qkv")
    yield case("no_key_bias", (67,), 40, (72, 72, 72), "qv")  # Whisper
    yield case("vector", (), 24, (40, 24, 16))
    yield case("empty_batch", (0, 5), 16, (24, 16, 16), "q")
    x = make(70, 2, 40).detach().transpose(0, 1).requires_grad_()
    weights = [make(40, n, scale=0.16).detach().t().requires_grad_() for n in (72, 40, 40)]
    yield Sample(args=(x, *weights, None, make(40), None), name="strided")
    for K, N in ((1024, (1024, 1024, 1024)), (2048, (2048, 512, 512))):
        yield case(f"2048x{K}x{N[0]}x{N[1]}", (2048,), K, N, "qkv" if N[1] == K else "", bench=True)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops)
