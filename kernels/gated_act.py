r"""An activation times a second tensor: the gate of SwiGLU, GeGLU and GLU without the layers around it.

    y = act(gate) * up                                        (computed in float32, rounded once)

Dauphin et al. 2017, "Language Modeling with Gated Convolutional Networks", arXiv:1612.08083; Shazeer 2020,
arXiv:2002.05202. For what gated_mlp cannot take whole: adapted layers (LoRA), FP8 layers, experts, output
gates of attention and of state space models. Where one tensor holds both, `up` is None: the gate's
features first, or after the others where `up_first`.

Saved for backward: gate and up. Eager keeps act(gate) besides. Both gradients come from one pass:
    dgate = dy * up * act'(gate),   dup = dy * act(gate)
`maxima`, where given, is raised to y's largest magnitudes, for whoever quantises y: fp8_maxima.py.
Shape suffixes: M rows (tokens), H features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import hidden_cpu
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.fp8_maxima import misfit
from fusekit.kernels.hidden_form import gated_form, parts
from fusekit.kernels.hidden_gpu import hidden_pass
from fusekit.kernels.launch import on_gpu, recording
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.linear_act import _rows, _shape
from fusekit.kernels.op import Op, Sample, not_runnable


def reference(
    gate: Tensor,
    up: Tensor | None = None,
    act: str = "silu",
    up_first: bool = False,
    maxima: Tensor | None = None,
) -> Tensor:
    """The definition: gate and up (..., H), or gate (..., 2 H) alone. Leaves maxima alone."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    z = [t.to(wide) for t in (gate, up) if t is not None]
    activated, factor = parts(z, gated_form(up, up_first))
    assert factor is not None
    return (ACTIVATIONS[act].reference(activated) * factor).to(gate.dtype)


def supports(
    gate: Tensor,
    up: Tensor | None = None,
    act: str = "silu",
    up_first: bool = False,
    maxima: Tensor | None = None,
) -> str | None:
    """None, or why gated_act does not run on these arguments."""
    return _refusal(gate, up, act, up_first) or (None if maxima is None else _no_maxima(gate, up, maxima))


def _no_maxima(gate: Tensor, up: Tensor | None, maxima: Tensor) -> str | None:
    return misfit(maxima, gate, _features(gate, up)) or not_runnable(gate, maxima)


def _features(gate: Tensor, up: Tensor | None) -> int:
    return gate.shape[-1] if up is not None else gate.shape[-1] // 2


def _refusal(gate: Tensor, up: Tensor | None, act: str, up_first: bool) -> str | None:
    if act not in ACTIVATIONS or act == "none":
        return f"activation {act!r} is none of {', '.join(sorted(ACTIVATIONS.keys() - {'none'}))}"
    if gate.dim() == 0:
        return "gate () needs a last dimension of features"
    if up is None and gate.shape[-1] % 2:
        return f"gate {_shape(gate)} holds gate and up, and its features are not even in number"
    if up is None:
        return not_runnable(gate)
    if up_first:
        return "up_first is about one tensor that holds both, and up is given"
    if gate.shape != up.shape:
        return f"gate {_shape(gate)} and up {_shape(up)} differ in shape; expand one first"
    if gate.dtype != up.dtype:
        return f"gate is {gate.dtype} and up is {up.dtype}; cast one"
    return not_runnable(gate, up)


def _checked(*args: Any) -> tuple[Any, ...]:
    if reason := supports(*args):
        raise ValueError(f"gated_act: {reason}")
    return args


def _empty(gate: Tensor, up: Tensor | None, *_: Any) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], _features(gate, up)))


def _dense_rows(gate: Tensor, up: Tensor | None) -> list[Tensor]:
    """(M, H) or (M, 2 H) each; copied where features are not side by side."""
    rows = [_rows(t) for t in (gate, up) if t is not None]
    return [t if t.stride(1) == 1 else t.contiguous() for t in rows]


def _run_forward(gate: Tensor, up: Tensor | None, act: str, up_first: bool, maxima: Tensor | None) -> Tensor:
    y, form, z = _empty(gate, up), gated_form(up, up_first), _dense_rows(gate, up)
    if not on_gpu(gate):
        _rows(y).copy_(hidden_cpu.activate([t.float() for t in z], act, form, in_place=False))
    elif y.numel() or recording():
        maxima = None if maxima is None or not maxima.numel() else maxima
        hidden_pass(z, None, act, form, _rows(y), [], maxima=maxima)
    return y


def _empty_grads(dy: Tensor, gate: Tensor, up: Tensor | None, act: str, up_first: bool) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (gate, up) if t is not None]


def _run_backward(dy: Tensor, gate: Tensor, up: Tensor | None, act: str, up_first: bool) -> list[Tensor]:
    grads, form = _empty_grads(dy, gate, up, act, up_first), gated_form(up, up_first)
    z, dz, dy = _dense_rows(gate, up), [_rows(grad) for grad in grads], _rows(dy).contiguous()
    if not on_gpu(gate):
        for grad, wide in zip(
            dz, hidden_cpu.derive([t.float() for t in z], dy.float(), act, form)[1], strict=True
        ):
            grad.copy_(wide)
    elif dy.numel() or recording():
        hidden_pass(z, dy, act, form, None, dz)
    return grads


_forward = define(
    "gated_act_forward(Tensor gate, Tensor? up, str act, bool up_first, Tensor(a!)? maxima) -> Tensor",
    _run_forward,
    _empty,
    check=_checked,
)
_backward = define(
    "gated_act_backward(Tensor dy, Tensor gate, Tensor? up, str act, bool up_first) -> Tensor[]",
    _run_backward,
    _empty_grads,
)


class _GatedAct(Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, act: str, up_first: bool, maxima: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.form = act, up_first
        return _forward(gate, up, act, up_first, maxima)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward("gated_act")
        dgate, *dup = _backward(dy, *ctx.saved_tensors, *ctx.form)
        needs = ctx.needs_input_grad
        return dgate if needs[0] else None, dup[0] if needs[1] else None, None, None, None


def _arguments(
    gate: Tensor,
    up: Tensor | None = None,
    act: str = "silu",
    up_first: bool = False,
    maxima: Tensor | None = None,
) -> tuple[Any, ...]:
    return gate, up, act, up_first, maxima


fused = define(
    "gated_act(Tensor gate, Tensor? up=None, str act='silu', bool up_first=False, Tensor(a!)? maxima=None)"
    " -> Tensor",
    lambda *args: _forward(*_arguments(*args)),
    lambda *args: _empty(*_checked(*args)),
    autograd=lambda *args: _GatedAct.apply(*_arguments(*args)),
)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Ragged, both layouts, every activation, views, empty; then hidden features of a GPT and of a Llama."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        few = torch.randn((*(min(size, 64) for size in shape[:-1]), shape[-1]), generator=generator)
        repeats = tuple(-(-size // max(1, some)) for size, some in zip(shape, few.shape, strict=True))
        rows = few.repeat(repeats)[tuple(map(slice, shape))]
        return rows.to(device, dtype).contiguous().requires_grad_()

    yield Sample(args=(make(3, 13, 150), make(3, 13, 150)), name="ragged")
    yield Sample(args=(make(37, 2 * 72), None, "gelu"), name="packed")
    yield Sample(args=(make(2, 19, 2 * 33), None, "sigmoid", True), name="packed, up first (GLU)")
    halves = make(29, 2 * 40).detach().chunk(2, -1)
    yield Sample(args=(*(t.requires_grad_() for t in halves), "gelu_tanh"), name="views of one tensor")
    turned = (make(40, 21).detach().t().requires_grad_() for _ in range(2))
    yield Sample(args=(*turned, "tanh"), name="transposed")
    apart = make(6, 4, 48).detach()[:, 1].requires_grad_()
    yield Sample(args=(apart, make(6, 48), "quick_gelu"), name="rows apart")
    yield Sample(args=(make(5, 24), make(5, 24), "relu"), name="ReLU")
    yield Sample(args=(make(24), make(24), "relu_squared"), name="vector")
    yield Sample(args=(make(0, 5, 16), make(0, 5, 16)), name="empty")
    for M, H in (2048, 1408), (8192, 14336):
        yield Sample(args=(make(M, H), make(M, H)), name=f"{M}x{H}", bench=True)
    yield Sample(args=(make(2048, 2 * 1408), None), name="2048x1408_packed", bench=True)


def flops(gate: Tensor, up: Tensor | None = None, *_: Any) -> int:
    """A product, and the activation as one more."""
    return 2 * math.prod(gate.shape) // (1 if up is not None else 2)


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops)
