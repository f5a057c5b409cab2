"""Arguments of the GEMM ops by shape, and what eager makes of them: for tests of unusual input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.kernels import OPS
from fusekit.kernels.parity import results_and_grads


class Case(NamedTuple):
    """A way to call the op `name`.

    eager: the same function by torch.nn.functional. make: the op's arguments of x and make(*shape).
    form: which of several ways, for the test's name.
    """

    name: str
    eager: Callable[..., Any]
    make: Callable[[Tensor, Callable[..., Tensor]], tuple[Any, ...]]
    form: str = ""


def label(case: Case) -> str:
    return case.form or case.name


def _linear_act(x: Tensor, weight: Tensor, bias: Tensor, residual: None, act: str) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _linear_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + residual


def _mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def _gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, _: None, b_up: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up, b_up), down)


def _packed(x: Tensor, gate_up: Tensor, up: None, down: Tensor, bias: Tensor) -> Tensor:
    gate, up_ = F.linear(x, gate_up, bias).chunk(2, -1)
    return F.linear(F.silu(gate) * up_, down)


def _qkv(x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, q, bias), F.linear(x, k), F.linear(x, v)


CASES = [
    Case("linear_act", F.linear, lambda x, make: (x, make(12, x.shape[-1]), make(12)), "linear"),
    Case("linear_act", _linear_act, lambda x, make: (x, make(12, x.shape[-1]), make(12), None, "gelu")),
    Case(
        "linear_act", _linear_residual,
        lambda x, make: (x, make(12, x.shape[-1]), make(12), make(*x.shape[:-1], 12)), "linear_residual",
    ),
    Case("mlp", _mlp, lambda x, make: (x, make(12, x.shape[-1]), make(12), make(7, 12), make(7))),
    Case(
        "gated_mlp", _gated,
        lambda x, make: (x, make(12, x.shape[-1]), make(12, x.shape[-1]), make(7, 12), None, make(12)),
    ),
    Case(
        "gated_mlp", _packed,
        lambda x, make: (x, make(24, x.shape[-1]), None, make(7, 12), make(24)), "gated_mlp_packed",
    ),
    Case(
        "qkv_linear", _qkv,
        lambda x, make: (x, make(12, x.shape[-1]), make(4, x.shape[-1]), make(4, x.shape[-1]), make(12)),
    ),
]  # fmt: skip


def maker(device: str, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 2).to(device, dtype).requires_grad_()

    return make


def arguments(case: Case, x: Tensor, device: str) -> tuple[Any, ...]:
    return case.make(x, maker(device))


def assert_as_eager(case: Case, args: tuple[Any, ...]) -> None:
    """Outputs, and which gradients there are, and their values and strides."""
    fused = results_and_grads(OPS[case.name].fused, args)
    expected = results_and_grads(case.eager, args)
    assert fused.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(fused[name], expected[name], rtol=2e-5, atol=2e-5, msg=name)
