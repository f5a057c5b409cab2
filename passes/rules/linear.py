"""Linear layers followed by an activation, a residual sum, or both: rows of linear_act.

    y = act(x @ weight.T + bias) + residual

A bare linear is no row: the library's GEMM has nothing to gain from us.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.passes.pattern import Rule

SHAPES = {"x": "* K", "weight": "N K", "bias": "optional N", "residual": "* N"}
ROOT_HALF = 1 / math.sqrt(2)
ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)

Map = Callable[[Tensor], Tensor]


def new_gelu(x: Tensor) -> Tensor:
    """transformers NewGELUActivation; GPT-2's and T5's own code."""
    return 0.5 * x * (1.0 + torch.tanh(ROOT_TWO_OVER_PI * (x + 0.044715 * torch.pow(x, 3.0))))


def fast_gelu(x: Tensor) -> Tensor:
    """transformers FastGELUActivation: the same polynomial, factored."""
    return 0.5 * x * (1.0 + torch.tanh(x * ROOT_TWO_OVER_PI * (1.0 + 0.044715 * x * x)))


def erf_gelu(x: Tensor) -> Tensor:
    """The original BERT code: the exact GELU written with erf."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def erf_gelu_scaled(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x * ROOT_HALF))


ACTIVATIONS: list[tuple[str, str, Map]] = [
    ("gelu", "torch.nn.GELU", F.gelu),
    ("gelu", "google-research BERT gelu", erf_gelu),
    ("gelu", "erf gelu, scaled", erf_gelu_scaled),
    ("gelu_tanh", "torch.nn.GELU(approximate='tanh')", lambda x: F.gelu(x, approximate="tanh")),
    ("gelu_tanh", "transformers NewGELUActivation", new_gelu),
    ("gelu_tanh", "transformers FastGELUActivation", fast_gelu),
    ("relu", "torch.nn.ReLU", F.relu),
    ("silu", "torch.nn.SiLU", F.silu),
    ("silu", "x * sigmoid(x)", lambda x: x * torch.sigmoid(x)),
    ("quick_gelu", "transformers QuickGELUActivation", lambda x: x * torch.sigmoid(1.702 * x)),
    ("tanh", "torch.nn.Tanh", torch.tanh),
    ("sigmoid", "torch.nn.Sigmoid", torch.sigmoid),
    ("relu_squared", "transformers ReLUSquaredActivation", lambda x: torch.square(F.relu(x))),
]


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """transformers Conv1D (GPT-2): the weight is stored transposed and the batch flattened."""
    rows = torch.addmm(bias, x.view(-1, x.size(-1)), weight.t())
    return rows.view(*x.shape[:-1], weight.shape[0])


def matmul_add(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.t() + bias


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


LINEARS = {"linear": (conv1d, matmul_add, matmul)}


def activated(act: Map) -> Callable[..., Tensor]:
    return lambda x, weight, bias: act(F.linear(x, weight, bias))


def summed(act: Map) -> Callable[..., Tensor]:
    return lambda x, weight, bias, residual: act(F.linear(x, weight, bias)) + residual


def _row(function: Callable[..., Tensor], source: str, act: str) -> Rule:
    return Rule("linear_act", function, source, SHAPES, {"act": act}, also=LINEARS)


RULES = [
    *(_row(activated(function), f"linear, {source}", act) for act, source, function in ACTIVATIONS),
    *(_row(summed(function), f"linear, {source}, residual", act) for act, source, function in ACTIVATIONS),
    _row(summed(lambda y: y), "linear, residual", "none"),
]
