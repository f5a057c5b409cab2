r"""A linear layer of a gated one: SwiGLU, GeGLU, ReGLU and their kin, as one op.

    gate = x @ w_gate.T + b_gate
    up = x @ w_up.T + b_up
    y = (act(gate) * up) @ w_down.T + b_down

Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202. Where one weight holds both, w_gate is
that weight (2 H, K) and w_up is None: the gate's rows first, or after the others where `up_first`.

Saved for backward: x, gate and up. Eager keeps act(gate) and the product besides, two more of MH elements (M
tokens, H hidden features); backward computes both again, in the pass that makes dgate and dup. Kernels, and
what they move: feed_forward.py.

`inherent`: gate, up, their product and their gradients meet products in x's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import feed_forward
from fusekit.kernels.hidden_form import gated_form
from fusekit.kernels.library import define
from fusekit.kernels.op import Op, Sample


def reference(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    act: str = "silu",
    up_first: bool = False,
    tf32: bool = False,
) -> Tensor:
    """The definition. gate and up are rounded to x's dtype, as two linear layers round them, and so is
    act(gate) * up where it meets w_down."""
    weights, biases = [w_gate], [b_gate]
    if w_up is not None:
        weights, biases = [w_gate, w_up], [b_gate, b_up]
    form = gated_form(w_up, up_first)
    return feed_forward.reference(x, weights, biases, w_down, b_down, None, act, form)


def _contradiction(w_up: Tensor | None, b_up: Tensor | None, act: str, up_first: bool) -> str | None:
    if act == "relu_squared":
        return "relu_squared squares the gate, and with it the rounding of the gate that backward reads"
    if w_up is None and b_up is not None:
        return "b_up is given, but no w_up: a packed w_gate has a packed b_gate"
    if w_up is not None and up_first:
        return "up_first is about a packed w_gate, and w_up is given"
    return None


def supports(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    act: str = "silu",
    up_first: bool = False,
    tf32: bool = False,
) -> str | None:
    """None, or why gated_mlp does not run on these arguments."""
    if reason := _contradiction(w_up, b_up, act, up_first):
        return reason
    named = {"w_gate": w_gate, "b_gate": b_gate, "w_down": w_down, "b_down": b_down}
    if w_up is not None:
        named = {"w_gate": w_gate, "w_up": w_up, "b_gate": b_gate, "b_up": b_up,
                 "w_down": w_down, "b_down": b_down}  # fmt: skip
    return feed_forward.refusal(x, None, act, gated_form(w_up, up_first), named)


def _arguments(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    act: str = "silu",
    up_first: bool = False,
    tf32: bool = False,
) -> tuple[Any, ...]:
    """The arguments of feed_forward's functions."""
    if reason := _contradiction(w_up, b_up, act, up_first):
        raise ValueError(f"gated_mlp: {reason}")
    first = (w_gate, b_gate) if w_up is None else (w_gate, w_up, b_gate, b_up)
    return act, gated_form(w_up, up_first), tf32, x, None, *first, w_down, b_down


def _fake(x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, *rest: Any) -> Tensor:
    feed_forward.check(*_arguments(x, w_gate, w_up, w_down, *rest))
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


fused = define(
    "gated_mlp(Tensor x, Tensor w_gate, Tensor? w_up, Tensor w_down, Tensor? b_gate=None, Tensor? b_up=None,"
    " Tensor? b_down=None, str act='silu', bool up_first=False, bool tf32=False) -> Tensor",
    lambda *args: feed_forward.infer(*_arguments(*args)),
    _fake,
    autograd=lambda *args: feed_forward.differentiable("gated_mlp", *_arguments(*args)),
    autocast="lower",
)


def flops(x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, *_: Any) -> int:
    return feed_forward.flops(x, w_gate, w_up, w_down)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Small: ragged, separate and packed weights, several activations. bench: two blocks."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    def case(name: str, lead: tuple[int, ...], K: int, H: int, act: str, *, bias: bool = False,
             form: str = "gated", bench: bool = False) -> Sample:  # fmt: skip
        packed = form != "gated"
        rows = 2 * H if packed else H
        x, w_gate = make(*lead, K), make(rows, K, scale=K**-0.5)
        w_up = None if packed else make(H, K, scale=K**-0.5)
        w_down = make(K, H, scale=H**-0.5)
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if bias:
            biases = (make(rows), None if packed else make(H), make(K))
        return Sample(args=(x, w_gate, w_up, w_down, *biases, act, form == "up_gate"), name=name, bench=bench)

    yield case("silu", (3, 13), 24, 40, "silu")
    yield case("gelu_biases", (67,), 33, 71, "gelu", bias=True)
    yield case("packed", (2, 35), 40, 72, "relu", form="gate_up")
    yield case("packed_up_first_biases", (37,), 24, 33, "gelu_tanh", form="up_gate", bias=True)
    yield case("vector", (), 24, 40, "sigmoid")
    yield case("empty_batch", (0, 5), 16, 24, "silu")
    x, w_gate, w_up, w_down = (
        make(20, 2, 33),
        make(33, 66, scale=0.17),
        make(66, 33, scale=0.17),
        make(33, 66),
    )
    x, w_gate = (t.detach().transpose(0, 1).requires_grad_() for t in (x, w_gate))
    yield Sample(args=(x, w_gate, w_up, w_down), name="strided")
    for rows, K, H in ((2048, 512, 1408), (2048, 1024, 2816)):
        yield case(f"{rows}x{K}x{H}", (rows,), K, H, "silu", bench=True)
        yield case(f"{rows}x{K}x{H}_packed", (rows,), K, H, "silu", form="gate_up", bench=True)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent=True)
