"""mlp and gated_mlp on a GPU: products whose epilogues do the rest; gated ones take a pass over h besides.

What is saved and which kernel does what: feed_forward.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.gated_gemm import gated_matmul
from fusekit.kernels.gemm import matmul, sum_partials
from fusekit.kernels.hidden_form import parts, stores_hidden, z_scale
from fusekit.kernels.launch import Plans, Repeated, kind_of
from fusekit.kernels.linear_gpu import share_rows, use_tf32, weight_gradients


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


def forward(
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


def backward(
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
