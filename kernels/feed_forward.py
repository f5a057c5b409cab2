r"""What mlp and gated_mlp share: two linear layers with an activation, gated or not, in between.

    z = x @ weight.T + bias                 of one weight, of two (gate, up), or of both packed in one
    h = act(z)    or    act(gate) * up
    y = h @ w_out.T + b_out + residual

M rows (tokens), K input features, H hidden features, N output features; e bytes an element. `parts` says
where gate and up are in what the first products give.

Forward, GPU: two products with everything in their epilogues; where gated, the first computes gate and up
side by side (gated_gemm.py). Saved for backward: x, the weights, and z, or gate and up, rounded to x's dtype,
z at a scale that keeps the second rounding of h free of bias (hidden_form.z_scale).
h is never saved, except where it is all that the derivative reads (ReLU, no activation): then z is not.

Backward, GPU: dh = dy @ w_out. Plain, the epilogue makes dz = dh * act'(z) of it, recomputes h and sums the
bias gradient. Gated, one pass (3 MH read, 3 MH written) e makes dgate in dh's place, dup and h, and adds up
the bias gradients' partial sums. Then grad_w_out = dy.T @ h, on which b_out's gradient rides, and the
products of a linear layer; grad_x of two weights is a product and a second one whose epilogue adds the first.
Sums have a fixed order.

GPU: feed_forward_gpu.py; CPU: feed_forward_cpu.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import feed_forward_cpu, feed_forward_gpu
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.hidden_form import PACKED, parts
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import (
    Function,
    define,
    is_last_backward,
    refuse_double_backward,
    saves_through_hooks,
)
from fusekit.kernels.linear_act import _optional_rows, _rows, _shape
from fusekit.kernels.linear_cpu import mixes
from fusekit.kernels.linear_gpu import asks_tf32
from fusekit.kernels.op import not_runnable


def reference(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    act: str,
    form: str,
) -> Tensor:
    """The same in plain PyTorch: gate and up are rounded to x's dtype, and h where it meets w_out."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(
            x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
        )

    z = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if form != "plain":
        z = [t.to(x.dtype).to(wide) for t in z]
    gate, up = parts(z, form)
    h = ACTIVATIONS[act].reference(gate)
    h = h if up is None else h * up
    y = linear(h.to(x.dtype), w_out, b_out)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def _empty_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    act: str,
    form: str,
    tf32: bool,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    lead = x.shape[:-1]
    saved = [x.new_empty((*lead, weight.shape[0])) for weight in weights] if save else []
    return x.new_empty((*lead, w_out.shape[0])), saved


def _forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    act: str,
    form: str,
    tf32: bool,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    y, saved = _empty_forward(x, weights, biases, w_out, b_out, residual, act, form, tf32, save)
    arguments = (_rows(x), weights, biases, w_out, b_out, _optional_rows(residual), act, form)
    results = (_rows(y), [_rows(z) for z in saved])
    if on_gpu(x):
        feed_forward_gpu.forward(*arguments, tf32, *results)
    else:
        feed_forward_cpu.forward(*arguments, *results)
    return y, saved


def _empty_backward(
    grad_output: Tensor,
    x: Tensor | None,
    weights: list[Tensor],
    w_out: Tensor,
    saved: list[Tensor],
    act: str,
    form: str,
    tf32: bool,
    needs: list[bool],
) -> list[Tensor]:
    """x, the weights with their strides, the biases, w_out, b_out; empty where `needs` says no."""
    n = len(weights)

    def make(index: int, weight: Tensor) -> Tensor:
        if not needs[index]:
            return grad_output.new_empty((0,))
        if index == 0:
            return grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))
        is_matrix = index <= n or index == 2 * n + 1
        return torch.empty_like(weight) if is_matrix else weight.new_empty((weight.shape[0],))

    behind = [weights[0], *weights, *weights, w_out, w_out]  # the weight that tells each gradient's shape
    return [make(index, weight) for index, weight in enumerate(behind)]


def _backward(
    grad_output: Tensor,
    x: Tensor | None,
    weights: list[Tensor],
    w_out: Tensor,
    saved: list[Tensor],
    act: str,
    form: str,
    tf32: bool,
    needs: list[bool],
    over_saved: bool = False,
) -> list[Tensor]:
    grads = _empty_backward(grad_output, x, weights, w_out, saved, act, form, tf32, needs)
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    n = len(weights)
    arguments = (_rows(grad_output), _optional_rows(x), weights, w_out, [_rows(z) for z in saved], act, form)
    grad_weights, grad_biases = wanted[1 : 1 + n], wanted[1 + n : 1 + 2 * n]
    results = (_optional_rows(wanted[0]), grad_weights, grad_biases, wanted[-2], wanted[-1])
    if on_gpu(grad_output):
        feed_forward_gpu.backward(*arguments, tf32, *results)
    else:
        feed_forward_cpu.backward(*arguments, *results, over_saved)
    return grads


# Of the first weights, their biases, w_out and b_out, by form: the op, and what it calls them.
NAMES = {
    "plain": ("mlp", ("w1", "b1", "w2", "b2")),
    "gated": ("gated_mlp", ("w_gate", "w_up", "b_gate", "b_up", "w_down", "b_down")),
    **dict.fromkeys(PACKED, ("gated_mlp", ("w_gate", "b_gate", "w_down", "b_down"))),
}


def _check(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], w_out: Tensor, b_out: Tensor | None,
    residual: Tensor | None, act: str, form: str, *_: Any,
) -> None:  # fmt: skip
    name, names = NAMES[form]
    named = dict(zip(names, (*weights, *biases, w_out, b_out), strict=True))
    reason = refusal(x, residual, act, form, named)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")


forward_op = define(
    "feed_forward_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor w_out, Tensor? b_out,"
    " Tensor? residual, str act, str form, bool tf32, bool save) -> (Tensor, Tensor[])",
    _forward,
    _empty_forward,
    check=_check,
    depends=asks_tf32,
)
backward_op = define(
    "feed_forward_backward(Tensor grad_output, Tensor? x, Tensor[] weights, Tensor w_out, Tensor[] saved,"
    " str act, str form, bool tf32, bool[] needs) -> Tensor[]",
    _backward,
    _empty_backward,
    depends=asks_tf32,
)
backward_over_saved_op = define(
    "feed_forward_backward_over_saved(Tensor grad_output, Tensor? x, Tensor[] weights, Tensor w_out,"
    " Tensor(a!)[] saved, str act, str form, bool tf32, bool[] needs) -> Tensor[]",
    functools.partial(_backward, over_saved=True),
    _empty_backward,
)


class _FeedForward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        act: str,
        form: str,
        tf32: bool,
        x: Tensor,
        residual: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        """parameters: the first weights, their biases, w_out, b_out."""
        weights, biases = _split(list(parameters))
        ctx.name, ctx.act, ctx.form, ctx.tf32 = name, act, form, tf32
        ctx.needs = [ctx.needs_input_grad[4], *ctx.needs_input_grad[6:]]
        n = len(weights) - 1
        save = any(ctx.needs[:-1])
        y, saved = forward_op(
            x, weights[:-1], biases[:-1], weights[-1], biases[-1], residual, act, form, tf32, save
        )
        ctx.save_for_backward(x if any(ctx.needs[1 : 1 + n]) else None, *weights, *saved)
        ctx.weights = len(weights)
        ctx.owns_saved = not saves_through_hooks()
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        refuse_double_backward(ctx.name)
        weights, w_out, saved = rest[: ctx.weights - 1], rest[ctx.weights - 1], rest[ctx.weights :]
        grads: list[Tensor | None] = [None] * len(ctx.needs)
        if any(ctx.needs):
            last = not on_gpu(grad_output) and ctx.owns_saved and is_last_backward(grad_output)
            if last:  # a retry after an error half way finds overwritten tensors: autograd then refuses it
                torch.autograd.graph.increment_version(saved)
            computed = (backward_over_saved_op if last else backward_op)(
                grad_output, x, weights, w_out, saved, ctx.act, ctx.form, ctx.tf32, ctx.needs
            )
            grads = [grad if need else None for grad, need in zip(computed, ctx.needs, strict=True)]
        residual = grad_output if ctx.needs_input_grad[5] else None
        return None, None, None, None, grads[0], residual, *grads[1:]


def _split(parameters: list[Any]) -> tuple[list[Any], list[Any]]:
    """The weights, w_out last, and the biases, b_out last."""
    *first, w_out, b_out = parameters
    n = len(first) // 2
    return [*first[:n], w_out], [*first[n:], b_out]


def infer(act: str, form: str, tf32: bool, x: Tensor, residual: Tensor | None, *parameters: Any) -> Tensor:
    weights, biases = _split(list(parameters))
    return forward_op(
        x, weights[:-1], biases[:-1], weights[-1], biases[-1], residual, act, form, tf32, False
    )[0]


def differentiable(name: str, *args: Any) -> Tensor:
    return _FeedForward.apply(name, *args) if torch.is_grad_enabled() else infer(*args)


def check(act: str, form: str, tf32: bool, x: Tensor, residual: Tensor | None, *parameters: Any) -> None:
    """Raise where `infer` and `differentiable` do not take these arguments."""
    weights, biases = _split(list(parameters))
    _check(x, weights[:-1], biases[:-1], weights[-1], biases[-1], residual, act, form)


def refusal(
    x: Tensor, residual: Tensor | None, act: str, form: str, named: dict[str, Tensor | None]
) -> str | None:
    """Why these arguments do not run; `named` are the first weights, their biases, w_out and b_out."""
    names, values = list(named), list(named.values())
    if act not in ACTIVATIONS:
        return f"activation {act!r} is none of {', '.join(ACTIVATIONS)}"
    if x.dim() == 0:
        return f"x {_shape(x)} needs a last dimension of features"
    weights, biases = _split(values)
    weight_names, bias_names = _split(names)
    for name, weight in zip(weight_names, weights, strict=True):
        if weight.dim() != 2:
            return f"{name} {_shape(weight)} needs two dimensions, output and input features"
    for name, weight in zip(weight_names[:-1], weights[:-1], strict=True):
        if weight.shape[1] != x.shape[-1]:
            return f"x {_shape(x)} and {name} {_shape(weight)} differ in input features"
        if weight.shape != weights[0].shape:
            return f"{weight_names[0]} {_shape(weights[0])} and {name} {_shape(weight)} differ in shape"
    rows, per_feature = weights[0].shape[0], 2 if form in PACKED else 1
    if rows != weights[-1].shape[1] * per_feature:
        return (
            f"{weight_names[-1]} {_shape(weights[-1])} does not take the {rows} features "
            f"{'(gate and up) ' if form in PACKED else ''}of {weight_names[0]} {_shape(weights[0])}"
        )
    for name, bias, weight in zip(bias_names, biases, weights, strict=True):
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
            return f"{name} {_shape(bias)} is not ({weight.shape[0]},), one value per output feature"
    shape = (*x.shape[:-1], weights[-1].shape[0])
    if residual is not None and residual.shape != shape:
        return f"residual {_shape(residual)} is not of y's shape {shape}; expand it first"
    parameters = weights[0].dtype if mixes(x, weights[0]) else x.dtype
    for name, tensor in (*named.items(), ("residual", residual)):
        dtype, other = (x.dtype, "x") if name == "residual" else (parameters, weight_names[0])
        other = "x" if dtype == x.dtype else other
        if tensor is not None and tensor.dtype != dtype:
            return f"{other} is {dtype} and {name} is {tensor.dtype}; cast one, or call under torch.autocast"
    return not_runnable(x, residual, *values)


def flops(x: Tensor, *weights: Tensor | None) -> int:
    return 2 * math.prod(x.shape[:-1]) * sum(w.shape[0] * w.shape[1] for w in weights if w is not None)
