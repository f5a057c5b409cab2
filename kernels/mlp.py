r"""Two linear layers with an activation in between, as one op.

    z = x @ w1.T + b1
    y = act(z) @ w2.T + b2 + residual

Saved for backward: x and z, of MK and MH elements (M tokens, K input features, H hidden ones). Eager keeps
act(z) besides; backward computes it again, in the pass that multiplies by act'(z). ReLU's derivative reads
act(z) alone, which then is what is saved. Kernels, and what they move: feed_forward.py.

`inherent`: act(z) and dz meet the second product in x's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import feed_forward
from fusekit.kernels.library import define
from fusekit.kernels.op import Op, Sample


def reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None = None,
    act: str = "gelu",
    tf32: bool = False,
) -> Tensor:
    """The definition; act(z) is rounded to x's dtype where it meets w2, as a matmul needs it."""
    return feed_forward.reference(x, [w1], [b1], w2, b2, residual, act, "plain")


def supports(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None = None,
    act: str = "gelu",
    tf32: bool = False,
) -> str | None:
    """None, or why mlp does not run on these arguments."""
    named = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return feed_forward.refusal(x, residual, act, "plain", named)


def _arguments(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None = None,
    act: str = "gelu",
    tf32: bool = False,
) -> tuple[Any, ...]:
    """The arguments of feed_forward's functions."""
    return act, "plain", tf32, x, residual, w1, b1, w2, b2


def _fake(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any) -> Tensor:
    feed_forward.check(*_arguments(x, w1, b1, w2, *rest))
    return x.new_empty((*x.shape[:-1], w2.shape[0]))


fused = define(
    "mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual=None, str act='gelu',"
    " bool tf32=False) -> Tensor",
    lambda *args: feed_forward.infer(*_arguments(*args)),
    _fake,
    autograd=lambda *args: feed_forward.differentiable("mlp", *_arguments(*args)),
    autocast="lower",
)


def flops(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *_: Any) -> int:
    return feed_forward.flops(x, w1, w2)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Small: ragged, strided, several activations and options. bench: GPT-2's and ViT-Large's blocks."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    def case(name: str, lead: tuple[int, ...], K: int, H: int, act: str, *, N: int | None = None,
             bias: bool = True, residual: bool = False, bench: bool = False) -> Sample:  # fmt: skip
        N = N or K
        first = make(*lead, K), make(H, K, scale=K**-0.5), make(H) if bias else None
        second = make(N, H, scale=H**-0.5), make(N) if bias else None
        return Sample(
            args=(*first, *second, make(*lead, N) if residual else None, act), name=name, bench=bench
        )

    yield case("gelu", (3, 13), 24, 40, "gelu")
    yield case("residual_ragged", (2, 35), 33, 67, "gelu_tanh", N=24, residual=True)
    yield case("relu_residual_no_bias", (65,), 40, 72, "relu", bias=False, residual=True)
    yield case("quick_gelu", (37,), 24, 33, "quick_gelu")
    yield case("none", (37,), 24, 40, "none")
    yield case("vector", (), 24, 40, "silu", bias=False)
    yield case("empty_batch", (0, 5), 16, 24, "gelu_tanh")
    x, w1, w2 = make(20, 2, 33), make(33, 66, scale=0.17), make(66, 33, scale=0.12)
    strided = x.detach().transpose(0, 1).requires_grad_()
    conv1d = [w.detach().t().requires_grad_() for w in (w1, w2)]  # as Hugging Face's Conv1D passes them
    yield Sample(
        args=(strided, conv1d[0], make(66), conv1d[1], make(33), None, "gelu"), name="strided_conv1d"
    )
    for rows, K in ((2048, 384), (2048, 1024)):
        yield case(f"{rows}x{K}x{4 * K}", (rows,), K, 4 * K, "gelu_tanh", bench=True)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent=True)
