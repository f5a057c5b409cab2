r"""Linear layer with its activation and residual sum, in one matrix product.

    z = x @ weight.T + bias
    y = act(z) + residual

M rows (tokens, the leading dimensions of x), N output features, K input features; e bytes an element.
Activations and their sources: activations.py.

Forward, GPU: one product; bias, activation and residual ride in its epilogue in float32, so y is rounded
once. Saved for backward: x, weight, and z rounded to x's dtype where act' needs it: not for "none", and ReLU
reads its own output, which the next layer keeps anyway. Bytes: (MK + NK + MN) e, + MN e for z, + MN e for a
residual.

Backward, GPU: dz = dy * act'(z) is one pass, (2 MN read + MN written) e, in which the bias gradient's partial
sums ride (linear_gpu.py). Then grad_input = dz @ weight and grad_weight = dz.T @ x by the forward's
kernel; "none" has dz = dy and no pass: its bias gradient rides on the product dz.T @ x. dz is not folded into
the loads of those two: each of their column blocks would evaluate act' again, and the operand would reach the
tensor cores through registers instead of shared memory, to save one pass. Every sum has a fixed order: no
atomics, the same bits each run.

GPU: linear_gpu.py; CPU: linear_cpu.py.

The gradients are `inherent`: tensor cores take dz in x's dtype and z is saved rounded, so on a GPU they carry
1.4 to 1.7 floors, below eager's. The output carries one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.kernels import linear_cpu, linear_gpu
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.linear_gpu import asks_tf32, share_rows  # noqa: F401
from fusekit.kernels.linear_gpu import dact as _dact  # noqa: F401
from fusekit.kernels.linear_gpu import use_tf32 as _use_tf32  # noqa: F401
from fusekit.kernels.op import Op, Sample, not_runnable


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    tf32: bool = False,
) -> Tensor:
    """The same in plain PyTorch; accumulates in at least float32 and rounds once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    y = ACTIVATIONS[act].reference(z)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def _rows(x: Tensor) -> Tensor:
    """x (..., F) as (M, F); a copy only where no strides describe it."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _optional_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else _rows(x)


def _stores_z(act: str, residual: Tensor | None) -> bool:
    return act != "none" and (residual is not None or not ACTIVATIONS[act].from_output)


def _empty_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, act: str, tf32: bool, save: bool
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save and _stores_z(act, residual) else (0,))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, act: str, tf32: bool, save: bool
) -> tuple[Tensor, Tensor]:
    y, z = _empty_forward(x, weight, bias, residual, act, tf32, save)
    stored = _rows(z) if save and _stores_z(act, residual) else None
    rows = (_rows(x), weight, bias, _optional_rows(residual), act)
    if on_gpu(x):
        linear_gpu.forward(*rows, tf32, _rows(y), stored)
    else:
        linear_cpu.forward(*rows, _rows(y), stored)
    return y, z


def _empty_backward(
    grad_output: Tensor,
    x: Tensor | None,
    weight: Tensor,
    saved: Tensor | None,
    act: str,
    tf32: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    N, K = weight.shape
    none = (0,)
    return (
        grad_output.new_empty((*grad_output.shape[:-1], K) if needs[0] else none),
        torch.empty_like(weight) if needs[1] else weight.new_empty(none),  # weight's strides: no copy later
        weight.new_empty((N,) if needs[2] else none),
    )


def _backward(
    grad_output: Tensor,
    x: Tensor | None,
    weight: Tensor,
    saved: Tensor | None,
    act: str,
    tf32: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty_backward(grad_output, x, weight, saved, act, tf32, needs)
    grad_input, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    rows = (_rows(grad_output), _optional_rows(x), weight, _optional_rows(saved), act)
    wanted = (_optional_rows(grad_input), grad_weight, grad_bias)
    if on_gpu(grad_output):
        linear_gpu.backward(*rows, tf32, *wanted)
    else:
        linear_cpu.backward(*rows, *wanted)
    return grads


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, act: str, tf32: bool, *_: Any
) -> None:
    if reason := supports(x, weight, bias, residual, act, tf32):
        raise ValueError(f"linear_act: {reason}")


forward_op = define(
    "linear_act_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str act, bool tf32,"
    " bool save) -> (Tensor, Tensor)",
    _forward,
    _empty_forward,
    check=_check,
    depends=asks_tf32,
)
backward_op = define(
    "linear_act_backward(Tensor grad_output, Tensor? x, Tensor weight, Tensor? saved, str act, bool tf32,"
    " bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_backward,
    depends=asks_tf32,
)


class _LinearAct(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        act: str,
        tf32: bool,
    ) -> Tensor:
        ctx.act, ctx.tf32 = act, tf32
        ctx.needs = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
        y, z = forward_op(x, weight, bias, residual, act, tf32, any(ctx.needs))
        saved = None
        if act != "none" and any(ctx.needs):
            saved = z if _stores_z(act, residual) else y
        ctx.save_for_backward(x if ctx.needs[1] else None, weight, saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        refuse_double_backward("linear_act")
        grads: list[Tensor | None] = [None, None, None]
        if any(ctx.needs):
            computed = backward_op(grad_output, x, weight, saved, ctx.act, ctx.tf32, ctx.needs)
            grads = [grad if need else None for grad, need in zip(computed, ctx.needs, strict=True)]
        return *grads, (grad_output if ctx.needs_input_grad[3] else None), None, None


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    tf32: bool = False,
) -> str | None:
    """None, or why linear_act does not run on these arguments."""
    if act not in ACTIVATIONS:
        return f"activation {act!r} is none of {', '.join(ACTIVATIONS)}"
    if x.dim() == 0 or weight.dim() != 2:
        return f"x {_shape(x)} needs a last dimension of features, and weight {_shape(weight)} two dimensions"
    N, K = weight.shape
    if x.shape[-1] != K:
        return f"x {_shape(x)} and weight {_shape(weight)} differ in input features; weight is (N, K)"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        return f"bias {_shape(bias)} is not ({N},), one value per output feature"
    if residual is not None and residual.shape != (*x.shape[:-1], N):
        return f"residual {_shape(residual)} is not of y's shape {(*x.shape[:-1], N)}; expand it first"
    parameters = weight.dtype if linear_cpu.mixes(x, weight) else x.dtype
    for name, tensor, dtype in (
        ("weight", weight, parameters),
        ("bias", bias, parameters),
        ("residual", residual, x.dtype),
    ):
        if tensor is not None and tensor.dtype != dtype:
            other = "x" if dtype == x.dtype else "weight"
            return f"{other} is {dtype} and {name} is {tensor.dtype}; cast one, or call under torch.autocast"
    return not_runnable(x, weight, bias, residual)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, bool]:
    return x, weight, bias, residual, act, tf32


def _infer(*args: Any) -> Tensor:
    return forward_op(*_arguments(*args), False)[0]


def _differentiable(*args: Any) -> Tensor:
    return _LinearAct.apply(*_arguments(*args)) if torch.is_grad_enabled() else _infer(*args)


def _fake(*args: Any) -> Tensor:
    _check(*_arguments(*args))
    x, weight = args[:2]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


fused = define(
    "linear_act(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, str act='none',"
    " bool tf32=False) -> Tensor",
    _infer,
    _fake,
    autograd=_differentiable,
    autocast="lower",
)


def flops(x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * math.prod(x.shape[:-1]) * weight.shape[0] * weight.shape[1]


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Small: ragged, several blocks, every activation and option. bench: the two linears of a GPT block."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    def case(name: str, lead: tuple[int, ...], N: int, K: int, act: str = "none", *, bias: bool = True,
             residual: bool = False, bench: bool = False) -> Sample:  # fmt: skip
        x, weight = make(*lead, K), make(N, K, scale=K**-0.5)
        extra = (make(N) if bias else None, make(*lead, N) if residual else None)
        return Sample(args=(x, weight, *extra, act), name=name, bench=bench)

    for act in ACTIVATIONS:
        yield case(act, (3, 43), 150, 70, act)
    yield case("bare", (129,), 67, 33, bias=False)
    yield case("residual", (2, 70), 96, 136, residual=True)
    yield case("gelu_residual", (2, 70), 72, 65, "gelu_tanh", residual=True)
    yield case("relu_residual_no_bias", (65,), 72, 65, "relu", bias=False, residual=True)
    yield case("vector", (), 70, 40, "silu")
    yield case("empty_batch", (0, 5), 24, 16, "gelu_tanh")
    x, weight = make(70, 2, 65), make(65, 130, scale=0.12)
    strided = x.detach().transpose(0, 1).requires_grad_()
    transposed = weight.detach().t().requires_grad_()  # as Hugging Face's Conv1D passes it
    yield Sample(args=(strided, transposed, make(130), None, "gelu"), name="strided_conv1d")
    for rows, K, N in ((2048, 384, 1536), (2048, 1024, 4096)):
        yield case(f"{rows}x{K}x{N}", (rows,), N, K, "gelu_tanh", bench=True)
        yield case(f"{rows}x{N}x{K}_residual", (rows,), K, N, residual=True, bench=True)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent="grad")
