r"""What mlp and gated_mlp share: two linear layers with an activation, gated or not, in between.

    z = x @ weight.T + bias                 of one weight, of two (gate, up), or of both packed in one
    h = act(z)    or    act(gate) * up
    y = h @ w_out.T + b_out + residual

M rows (tokens), K input features, H hidden features, N output features; e bytes an element. `parts` says
where gate and up are in what the first products give.

Forward, GPU: two products with everything in their epilogues; where gated, the first computes gate and up
side by side (gated_gemm.py). Saved for backward: x, the weights, and z, or gate and up, rounded to x's dtype,
z at a scale that keeps the second rounding of h free of bias (hidden_cpu.z_scale).
h is never saved, except where it is all that the derivative reads (ReLU, no activation): then z is not.

Backward, GPU: dh = dy @ w_out. Plain, the epilogue makes dz = dh * act'(z) of it, recomputes h and sums the
bias gradient. Gated, one pass (3 MH read, 3 MH written) e makes dgate in dh's place, dup and h, and adds up
the bias gradients' partial sums. Then grad_w_out = dy.T @ h, on which b_out's gradient rides, and the
products of a linear layer; grad_x of two weights is a product and a second one whose epilogue adds the first.
Sums have a fixed order.

CPU: feed_forward_cpu.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import feed_forward_cpu
from fusekit.kernels._triton import tl, triton
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.gated_gemm import gated_matmul
from fusekit.kernels.gemm import matmul, sum_partials
from fusekit.kernels.hidden_cpu import PACKED, parts, stores_hidden, z_scale
from fusekit.kernels.launch import Plans, Repeated, kind_of, on_gpu
from fusekit.kernels.library import define, is_last_backward, refuse_double_backward, saves_through_hooks
from fusekit.kernels.linear_act import _optional_rows, _rows, _shape
from fusekit.kernels.linear_cpu import mixes
from fusekit.kernels.linear_gpu import share_rows, use_tf32, weight_gradients
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


@triton.jit
def _hidden_backward_kernel(
    dh_ptr, z_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, partial_ptr, partial_up_ptr, M, N, rows_per_program,
    stride_z, stride_dz, stride_partial, ACT: tl.constexpr, BACKWARD: tl.constexpr, Z_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * rows_per_program
    last = min(first + rows_per_program, M)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total_up = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for row in range(first, last, BLOCK_M):
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < last)[:, None] & (columns < N)[None, :]
        offsets = rows[:, None] * N + columns[None, :]
        z_offsets = rows[:, None] * stride_z + columns[None, :]
        dz_offsets = rows[:, None] * stride_dz + columns[None, :]
        z = tl.load(z_ptr + z_offsets, mask=mask, other=0.0).to(tl.float32)
        if Z_SCALE != 1.0:
            z *= 1.0 / Z_SCALE
        h = ACT(z)
        if up_ptr is not None:
            up = tl.load(up_ptr + z_offsets, mask=mask, other=0.0).to(tl.float32)
            if dh_ptr is not None:
                dh = tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                dup = dh * h
                dgate = BACKWARD(dh * up, z)
                tl.store(dup_ptr + dz_offsets, dup.to(dup_ptr.dtype.element_ty), mask=mask)
                tl.store(dgate_ptr + dz_offsets, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
                total += tl.sum(dgate, axis=0)
                total_up += tl.sum(dup, axis=0)
            h *= up
        if h_ptr is not None:
            tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)
    partials = tl.program_id(1).to(tl.int64) * stride_partial + columns
    if partial_ptr is not None:
        tl.store(partial_ptr + partials, total, mask=columns < N)
    if partial_up_ptr is not None:
        tl.store(partial_up_ptr + partials, total_up, mask=columns < N)


BLOCK_M, BLOCK_N, NUM_WARPS = 16, 128, 4
PROGRAMS = 1024  # about 8 of 4 warps for each of 132 multiprocessors


def _forward_triton(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    act: str,
    form: str,
    tf32: bool,
    y: Tensor,
    saved: list[Tensor],
) -> None:
    tf32 = use_tf32(x, tf32)
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    if form == "plain":
        keeps = stores_hidden(act, form)
        h = saved[0] if saved and keeps else x.new_empty((x.shape[0], weights[0].shape[0]))
        z = saved[0] if saved and not keeps else None
        scale = z_scale(x.dtype, form)
        matmul(x, weights[0].t(), h, bias=biases[0], act=act, z=z, z_scale=scale, tf32=tf32)
    else:
        h = x.new_empty((x.shape[0], w_out.shape[1]))
        gated_matmul(x, weights, biases, act, form, h, saved, tf32)
    b_out = None if b_out is None else b_out.contiguous()
    matmul(h, w_out.t(), y, bias=b_out, residual=residual, tf32=tf32)


def _hidden_pass(
    saved: list[Tensor], dh: Tensor | None, act: str, form: str, with_h: bool, with_bias: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """h (M, H), and with dh dz of each weight and the float32 partial sums of its columns."""
    z, up = parts(saved, form)
    M, H = z.shape
    key = act, form, with_h, with_bias, M, H, z.get_device(), *map(kind_of, (z, up, dh))
    start, programs, rows = _hidden_passes(key, lambda: _plan_hidden_pass(M, H, act, z_scale(z.dtype, form)))
    h = z.new_empty((M, H)) if with_h else None
    dzs = [] if dh is None else [torch.empty_like(t) for t in saved]
    if dh is not None and form == "gated":
        dzs[0] = dh  # dgate takes the place of dh
    partials = [dz.new_empty((programs, dz.shape[1]), dtype=torch.float32) for dz in dzs if with_bias]
    dgate, dup = parts(dzs, form) if dzs else (None, None)
    partial, partial_up = parts(partials, form) if partials else (None, None)
    start(
        dh, z, up, dgate, dup, h, partial, partial_up, M, H, rows,
        z.stride(0), 0 if dgate is None else dgate.stride(0), 0 if partial is None else partial.stride(0),
    )  # fmt: skip
    return h, dzs, partials


_hidden_passes = Plans()


def _plan_hidden_pass(M: int, H: int, act: str, scale: float) -> tuple[Repeated, int, int]:
    """The start, the programs that share the rows, and the rows of each."""
    programs, rows = share_rows(M, H, BLOCK_M, BLOCK_N, PROGRAMS)
    start = Repeated(
        _hidden_backward_kernel, (triton.cdiv(H, BLOCK_N), programs),
        ACT=ACTIVATIONS[act].kernel, BACKWARD=ACTIVATIONS[act].kernel_backward,
        Z_SCALE=scale, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
    )  # fmt: skip
    return start, programs, rows


def _backward_triton(
    grad: Tensor,
    x: Tensor | None,
    weights: list[Tensor],
    w_out: Tensor,
    saved: list[Tensor],
    act: str,
    form: str,
    tf32: bool,
    grad_x: Tensor | None,
    grad_weights: list[Tensor | None],
    grad_biases: list[Tensor | None],
    grad_w_out: Tensor | None,
    grad_b_out: Tensor | None,
) -> None:
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    tf32 = use_tf32(grad, tf32)
    if not saved:  # b_out alone needs a gradient
        weight_gradients(grad, None, None, grad_b_out, tf32)
        return
    inner = grad_x is not None or any(g is not None for g in (*grad_weights, *grad_biases))
    with_h = grad_w_out is not None and not stores_hidden(act, form)
    h: Tensor | None = None
    dh: Tensor | None = None
    dzs: list[Tensor] = []
    if inner:
        dh = grad.new_empty((grad.shape[0], w_out.shape[1]))
    if dh is not None and form == "plain":
        h = torch.empty_like(dh) if with_h else None
        scale = 1.0 if stores_hidden(act, form) else z_scale(grad.dtype, form)
        matmul(grad, w_out, dh, dact=act, z=saved[0], z_scale=scale, h=h, grad_bias=grad_biases[0], tf32=tf32)
        dzs = [dh]
    else:
        if dh is not None:
            matmul(grad, w_out, dh, tf32=tf32)
        if dh is not None or with_h:
            with_bias = any(g is not None for g in grad_biases)
            h, dzs, partials = _hidden_pass(saved, dh, act, form, with_h, with_bias)
            for grad_bias, partial in zip(grad_biases, partials, strict=False):
                if grad_bias is not None:
                    sum_partials(partial, grad_bias)
    weight_gradients(grad, saved[0] if h is None else h, grad_w_out, grad_b_out, tf32)
    h = None
    for i, (dz, weight, grad_weight) in enumerate(zip(dzs, weights, grad_weights, strict=False)):
        if grad_x is not None:
            matmul(dz, weight, grad_x, residual=grad_x if i else None, tf32=tf32)
        if grad_weight is not None and x is not None:
            matmul(dz.t(), x, grad_weight, tf32=tf32)


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
        _forward_triton(*arguments, tf32, *results)
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
        _backward_triton(*arguments, tf32, *results)
    else:
        feed_forward_cpu.backward(*arguments, *results, over_saved)
    return grads


forward_op = define(
    "feed_forward_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor w_out, Tensor? b_out,"
    " Tensor? residual, str act, str form, bool tf32, bool save) -> (Tensor, Tensor[])",
    _forward,
    _empty_forward,
)
backward_op = define(
    "feed_forward_backward(Tensor grad_output, Tensor? x, Tensor[] weights, Tensor w_out, Tensor[] saved,"
    " str act, str form, bool tf32, bool[] needs) -> Tensor[]",
    _backward,
    _empty_backward,
)
backward_over_saved_op = define(
    "feed_forward_backward_over_saved(Tensor grad_output, Tensor? x, Tensor[] weights, Tensor w_out,"
    " Tensor(a!)[] saved, str act, str form, bool tf32, bool[] needs) -> Tensor[]",
    functools.partial(_backward, over_saved=True),
    _empty_backward,
)


class _FeedForward(torch.autograd.Function):
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
