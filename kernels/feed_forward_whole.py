"""mlp and gated_mlp in a 16-bit dtype that the CPU multiplies: products of all rows, and passes over h.

All rows, since oneDNN packs the weights in every call; blocks of rows would pay for that once each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusekit.kernels import linear_cpu
from fusekit.kernels.hidden_cpu import activate, activate_whole, compiled, derive, derive_whole
from fusekit.kernels.hidden_form import parts, stores_hidden, z_scale
from fusekit.kernels.linear_cpu import PASS_BYTES, _affine, _row_blocks, multiplies

HIDDEN_BYTES = (
    4 << 20
)  # of h in a block of columns: 2048 x 4096, forward and backward, as fast as all at once
LEAST_WIDTH = 512


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
    over_saved: bool = False,
) -> None:
    """As feed_forward_cpu.backward. Of h and its gradient no more than a block of columns is in memory."""
    if grad_b_out is not None:
        torch.sum(grad, 0, out=grad_b_out)  # in float32, rounded once; dtype=float32 would copy all of it
    if not saved:  # b_out alone needs a gradient
        return
    inner = any(g is not None for g in (grad_x, *grad_weights, *grad_biases))
    dzs = [t if over_saved else torch.empty_like(t) for t in saved] if inner else []
    sums = [grad.new_zeros(dz.shape[1], dtype=torch.float32) for dz in dzs]
    for columns in _column_blocks(len(grad), w_out.shape[1]):
        dh = grad @ w_out[:, columns] if inner else None
        block = [[t[..., columns] for t in _halves(each, form)] for each in (saved, dzs, sums)]
        h = _hidden_gradients(block[0], dh, act, form, *block[1:])
        if grad_w_out is not None:
            torch.mm(grad.t(), h, out=grad_w_out[:, columns])
        del dh, h
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


def _column_blocks(M: int, H: int) -> Iterator[slice]:
    """Of equal width, a whole number of lanes, but for the last."""
    blocks = max(1, -(-2 * M * H // HIDDEN_BYTES))
    width = max(LEAST_WIDTH, -(-H // (64 * blocks)) * 64)
    return (slice(start, min(start + width, H)) for start in range(0, H, width))


def _halves(tensors: list[Tensor], form: str) -> list[Tensor]:
    """Of each weight's features: gate, and up where there is one; none of none."""
    return [t for t in parts(tensors, form) if t is not None] if tensors else []


def _hidden_gradients(
    z: list[Tensor], dh: Tensor | None, act: str, form: str, dzs: list[Tensor], sums: list[Tensor]
) -> Tensor:
    """h of gate, or gate and up, which may take dh's memory; with dh their gradients and column sums."""
    rescale = 1.0 if stores_hidden(act, form) else 1.0 / z_scale(z[0].dtype, form)
    if dh is not None and compiled(act, z[0].dtype):
        derive_whole(z, dh, act, rescale, dzs, sums)
        return dh
    h = z[0].new_empty(z[0].shape)
    form = "plain" if len(z) == 1 else "gated"
    for rows in _row_blocks(len(h), len(z) * h.shape[1], PASS_BYTES):
        wide = [t[rows].float().mul_(rescale) for t in z]
        h[rows], block_dzs = derive(wide, None if dh is None else dh[rows].float(), act, form)
        for dz, block_dz, total in zip(dzs, block_dzs, sums, strict=False):
            dz[rows] = block_dz
            total += block_dz.sum(0)
    return h
