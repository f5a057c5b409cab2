r"""Activations of a linear layer: one table of references, Triton device functions and CPU passes.

Sources: GELU, Hendrycks & Gimpel 2016, arXiv:1606.08415 (erf, its tanh form, and x * sigmoid(1.702 x));
SiLU, Elfwing et al. 2017, arXiv:1702.03118; squared ReLU, So et al. 2021, arXiv:2109.08668.

GELU's tanh form is computed as x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), the same function, since
(1 + tanh(u)) / 2 = sigmoid(2u). It needs one exp2 instead of a tanh, and the left tail stays accurate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.kernels._triton import libdevice, tl, triton

aten = torch.ops.aten

_LOG2E = tl.constexpr(1 / math.log(2))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_QUICK = 1.702
_QUICK_CONST = tl.constexpr(_QUICK)

# 2u = x (A + B x^2), and its derivative A + 3 B x^2
_A = 2 * math.sqrt(2 / math.pi)
_B = _A * 0.044715
_A_CONST = tl.constexpr(_A)
_B_CONST = tl.constexpr(_B)


# Device functions: float32 in, float32 out. Backward takes what the forward saved: the pre-activation z.


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))


@triton.jit
def none_forward(z):
    return z


@triton.jit
def none_backward(dy, z):
    return dy


@triton.jit
def gelu_forward(z):
    return 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))


@triton.jit
def gelu_backward(dy, z):
    cdf = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
    pdf = tl.exp2(-0.5 * _LOG2E * z * z) * _INV_SQRT_2PI
    return dy * (cdf + z * pdf)


@triton.jit
def gelu_tanh_forward(z):
    return z * _sigmoid(z * (_A_CONST + _B_CONST * z * z))


@triton.jit
def gelu_tanh_backward(dy, z):
    s = _sigmoid(z * (_A_CONST + _B_CONST * z * z))
    # z * s first: it is 0 where the slope has overflowed, so no 0 * inf
    return dy * (s + (z * s) * (1.0 - s) * (_A_CONST + 3.0 * _B_CONST * z * z))


@triton.jit
def relu_forward(z):
    return tl.where(z <= 0.0, 0.0, z)  # a NaN stays, as in torch


@triton.jit
def relu_backward(dy, y):
    return tl.where(y <= 0.0, 0.0, dy)  # y or z: their signs agree


@triton.jit
def relu_squared_forward(z):
    r = relu_forward(z)
    return r * r


@triton.jit
def relu_squared_backward(dy, z):
    return tl.where(z <= 0.0, 0.0, 2.0 * z * dy)


@triton.jit
def silu_forward(z):
    return z * _sigmoid(z)


@triton.jit
def silu_backward(dy, z):
    s = _sigmoid(z)
    return dy * (s + (z * s) * (1.0 - s))


@triton.jit
def quick_gelu_forward(z):
    return z * _sigmoid(_QUICK_CONST * z)


@triton.jit
def quick_gelu_backward(dy, z):
    s = _sigmoid(_QUICK_CONST * z)
    return dy * (s + _QUICK_CONST * (z * s) * (1.0 - s))


@triton.jit
def tanh_forward(z):
    return libdevice.tanh(z)


@triton.jit
def tanh_backward(dy, z):
    t = libdevice.tanh(z)
    return dy * (1.0 - t * t)


@triton.jit
def sigmoid_forward(z):
    return _sigmoid(z)


@triton.jit
def sigmoid_backward(dy, z):
    return dy * _sigmoid(z) * _sigmoid(-z)


# CPU passes over float32 blocks that fit a cache: forward(z, out) where out may be z, backward(grad, z, out)
# where out may be grad. 256 x 1536 values, one thread of an AVX2 processor: gelu_tanh 0.5 ms against 1.5 ms
# of ATen's tanh-bound pass, its backward 0.8 against 1.4.


def _gate_by_sigmoid(logit: Tensor, z: Tensor, out: Tensor) -> None:
    torch.mul(z, logit.sigmoid_(), out=out)


def _none_cpu(z: Tensor, out: Tensor) -> Tensor:
    return out if out.data_ptr() == z.data_ptr() else out.copy_(z)


def _gelu_tanh_cpu(z: Tensor, out: Tensor) -> None:
    _gate_by_sigmoid(torch.mul(z, z).mul_(_B).add_(_A).mul_(z), z, out)


def _gelu_tanh_backward_cpu(grad: Tensor, z: Tensor, out: Tensor) -> None:
    slope = torch.mul(z, z).mul_(_B)
    s = torch.add(slope, _A).mul_(z).sigmoid_()
    slope.mul_(3).add_(_A)
    y = torch.mul(z, s)
    y.addcmul_(y, s, value=-1).mul_(slope).add_(s)
    torch.mul(grad, y, out=out)


def _relu_squared_cpu(z: Tensor, out: Tensor) -> None:
    torch.clamp_min(z, 0, out=out)
    out.mul_(out)


def _relu_squared_backward_cpu(grad: Tensor, z: Tensor, out: Tensor) -> None:
    torch.mul(grad, z, out=out)
    aten.threshold_backward.grad_input(out.mul_(2), z, 0, grad_input=out)


def _quick_gelu_backward_cpu(grad: Tensor, z: Tensor, out: Tensor) -> None:
    aten.silu_backward.grad_input(grad, z * _QUICK, grad_input=out)  # d/dz of silu(qz)/q


class Activation(NamedTuple):
    """One activation everywhere it runs.

    reference: on any floating dtype; autograd through it gives the derivative.
    kernel, kernel_backward: Triton device functions, act(z) and dy * act'(z).
    cpu, cpu_backward: the same over float32 blocks, `cpu(z, out)` and `cpu_backward(grad, z, out)`.
    from_output: the derivative is the same computed from the output, so no z is stored. Only ReLU:
        1 - y^2 of a tanh rounded to 8 bits is off by 2.7 roundings at z = 1, and 1 - y of a sigmoid alike.
    """

    reference: Callable[[Tensor], Tensor]
    kernel: Any
    kernel_backward: Any
    cpu: Callable[[Tensor, Tensor], Any]
    cpu_backward: Callable[[Tensor, Tensor, Tensor], Any]
    from_output: bool = False


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(
        lambda z: z, none_forward, none_backward,
        _none_cpu, lambda grad, z, out: out,  # never stores a z, so out is grad
    ),
    "gelu": Activation(
        F.gelu, gelu_forward, gelu_backward,
        lambda z, out: aten.gelu.out(z, out=out),
        lambda grad, z, out: aten.gelu_backward.grad_input(grad, z, grad_input=out),
    ),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"), gelu_tanh_forward, gelu_tanh_backward,
        _gelu_tanh_cpu, _gelu_tanh_backward_cpu,
    ),
    "relu": Activation(
        F.relu, relu_forward, relu_backward,
        lambda z, out: torch.clamp_min(z, 0, out=out),
        lambda grad, y, out: aten.threshold_backward.grad_input(grad, y, 0, grad_input=out),
        from_output=True,
    ),
    "silu": Activation(
        F.silu, silu_forward, silu_backward,
        lambda z, out: aten.silu.out(z, out=out),
        lambda grad, z, out: aten.silu_backward.grad_input(grad, z, grad_input=out),
    ),
    "quick_gelu": Activation(
        lambda z: z * torch.sigmoid(_QUICK * z), quick_gelu_forward, quick_gelu_backward,
        lambda z, out: _gate_by_sigmoid(z * _QUICK, z, out), _quick_gelu_backward_cpu,
    ),
    "tanh": Activation(
        torch.tanh, tanh_forward, tanh_backward,
        lambda z, out: torch.tanh(z, out=out),
        lambda grad, z, out: aten.tanh_backward.grad_input(grad, torch.tanh(z), grad_input=out),
    ),
    "sigmoid": Activation(
        torch.sigmoid, sigmoid_forward, sigmoid_backward,
        lambda z, out: torch.sigmoid(z, out=out),
        lambda grad, z, out: aten.sigmoid_backward.grad_input(grad, torch.sigmoid(z), grad_input=out),
    ),
    "relu_squared": Activation(
        lambda z: F.relu(z).square(), relu_squared_forward, relu_squared_backward,
        _relu_squared_cpu, _relu_squared_backward_cpu,
    ),
}  # fmt: skip
