"""mlp and gated_mlp on a GPU: products whose epilogues do the rest; gated ones take a pass over h besides.

What is saved and which kernel does what: feed_forward.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels.gated_gemm import gated_matmul
from fusekit.kernels.gemm import matmul, sum_partials
from fusekit.kernels.hidden_form import stores_hidden, z_scale
from fusekit.kernels.hidden_gpu import hidden_pass
from fusekit.kernels.linear_gpu import use_tf32, weight_gradients


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
            h = grad.new_empty((grad.shape[0], w_out.shape[1])) if with_h else None
            if dh is not None:  # dgate takes the place of dh
                dzs = [dh, torch.empty_like(dh)] if form == "gated" else [torch.empty_like(saved[0])]
            with_bias = any(g is not None for g in grad_biases)
            partials = hidden_pass(saved, dh, act, form, h, dzs, with_bias)
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
