"""mlp and gated_mlp in a 16-bit dtype that the CPU multiplies: whole products, one pass over h in between.

Whole, since oneDNN packs the weights in every call; blocks of rows would pay for that once each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import linear_cpu
from fusekit.kernels.hidden_cpu import (
    activate,
    activate_whole,
    compiled,
    derive,
    derive_whole,
    stores_hidden,
    z_scale,
)
from fusekit.kernels.linear_cpu import PASS_BYTES, _affine, _row_blocks, multiplies


def takes(dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and multiplies(dtype)


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    act: str,
    form: str,
    y: Tensor,
    saved: list[Tensor],
) -> None:
    """As feed_forward_cpu.forward."""
    keeps = stores_hidden(act, form)
    h = saved[0] if saved and keeps else x.new_empty((len(x), w_out.shape[1]))
    if form == "plain":
        z = saved[0] if saved and not keeps else None
        linear_cpu.forward(x, weights[0], biases[0], None, act, h, z, z_scale(x.dtype, form))
    else:
        _gate(x, weights, biases, act, form, h, saved)
    linear_cpu.forward(h, w_out, b_out, residual, "none", y, None)


def _gate(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    act: str,
    form: str,
    h: Tensor,
    saved: list[Tensor],
) -> None:
    z = saved or [x.new_empty((len(x), len(weight))) for weight in weights]
    for weight, bias, out in zip(weights, biases, z, strict=True):
        _affine(x, weight, bias, out)
    if compiled(act, x.dtype):
        activate_whole(z, act, form, h)
        return
    for rows in _row_blocks(len(x), h.shape[1], PASS_BYTES):
        h[rows] = activate([t[rows].float() for t in z], act, form, in_place=True)


def backward(
    grad: Tensor,
    x: Tensor | None,
    weights: list[Tensor],
    w_out: Tensor,
    saved: list[Tensor],
    act: str,
    form: str,
    grad_x: Tensor | None,
    grad_weights: list[Tensor | None],
    grad_biases: list[Tensor | None],
    grad_w_out: Tensor | None,
    grad_b_out: Tensor | None,
) -> None:
    """As feed_forward_cpu.backward."""
    if grad_b_out is not None:
        grad_b_out.copy_(grad.sum(0, dtype=torch.float32))
    h, dzs, sums = _hidden_gradients(grad, w_out, saved, act, form, (grad_x, *grad_weights, *grad_biases))
    if grad_w_out is not None and h is not None:
        torch.mm(grad.t(), h, out=grad_w_out)
    del h
    for grad_bias, total in zip(grad_biases, sums, strict=False):
        if grad_bias is not None:
            grad_bias.copy_(total)
    for i, (dz, weight, grad_weight) in enumerate(zip(dzs, weights, grad_weights, strict=False)):
        if grad_x is not None and i == 0:
            torch.mm(dz, weight, out=grad_x)
        elif grad_x is not None:
            grad_x.addmm_(dz, weight)
        if grad_weight is not None and x is not None:
            torch.mm(dz.t(), x, out=grad_weight)


def _hidden_gradients(
    grad: Tensor, w_out: Tensor, saved: list[Tensor], act: str, form: str, wanted: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """h, the dz of each weight, and their float32 column sums; the latter two empty if none is wanted."""
    if not saved:  # b_out alone needs a gradient
        return None, [], []
    inner = any(g is not None for g in wanted)
    dh = grad @ w_out if inner else None
    dzs = [torch.empty_like(t) for t in saved] if inner else []
    if dh is not None and compiled(act, grad.dtype):
        return dh, dzs, derive_whole(saved, dh, act, form, dzs)
    rescale = 1.0 if stores_hidden(act, form) else 1.0 / z_scale(grad.dtype, form)
    h = grad.new_empty((len(grad), w_out.shape[1]))
    sums = [grad.new_zeros(dz.shape[1], dtype=torch.float32) for dz in dzs]
    for rows in _row_blocks(len(grad), sum(t.shape[1] for t in saved), PASS_BYTES):
        narrow = [t[rows].float().mul_(rescale) for t in saved]
        h[rows], block_dzs = derive(narrow, None if dh is None else dh[rows].float(), act, form)
        for dz, block_dz, total in zip(dzs, block_dzs, sums, strict=False):
            dz[rows] = block_dz
            total += block_dz.sum(0)
    return h, dzs, sums
