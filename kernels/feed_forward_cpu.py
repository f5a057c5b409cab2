"""The CPU path of mlp and gated_mlp: both products over blocks of rows, so the hidden features stay in cache.

float32, and 16-bit dtypes that the processor does not multiply (widened, see linear_cpu.py): a block of rows
goes through both products, and only what backward needs is written whole. Backward does the same, weight
gradients adding up over blocks. 16-bit dtypes that it does multiply: feed_forward_whole.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import feed_forward_whole
from fusekit.kernels.hidden_cpu import activate, derive
from fusekit.kernels.hidden_form import stores_hidden
from fusekit.kernels.linear_cpu import _affine, _row_blocks


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
    """Write y (M, N), and what `saved` has room for.

    Args:
        x: (M, K); weights: (H, K) each, (2 H, K) where packed; w_out: (N, H); residual: (M, N); any strides.
        y: (M, N), contiguous.
        saved: none, or one contiguous (M, rows of the weight) for each weight.
    """
    if feed_forward_whole.takes(x.dtype):
        feed_forward_whole.forward(x, weights, biases, w_out, b_out, residual, act, form, y, saved)
        return
    weights, biases = [w.float() for w in weights], [_wide(b) for b in biases]
    w_out, b_out = w_out.float(), _wide(b_out)
    direct = bool(saved) and x.dtype == torch.float32 and not stores_hidden(act, form)
    for rows in _row_blocks(x.shape[0], sum(weight.shape[0] for weight in weights)):
        block = x[rows].float()
        z = [t[rows] for t in saved] if direct else [block.new_empty((len(block), len(w))) for w in weights]
        for weight, bias, out in zip(weights, biases, z, strict=True):
            _affine(block, weight, bias, out)
        if saved and not direct and not stores_hidden(act, form):
            for whole, part in zip(saved, z, strict=True):
                whole[rows] = part
        h = activate(z, act, form, in_place=not direct)
        if saved and stores_hidden(act, form):
            saved[0][rows] = h
        if y.dtype == torch.float32:
            _affine(h, w_out, b_out, y[rows])
            if residual is not None:
                y[rows] += residual[rows]
            continue
        wide = h @ w_out.t() if b_out is None else torch.addmm(b_out, h, w_out.t())
        y[rows] = wide if residual is None else wide.add_(residual[rows])


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
    """Write the gradients that are not None.

    Args:
        grad: (M, N), any strides.
        x: (M, K), needed for the first weights' gradients only.
        saved: what forward wrote; none where b_out alone needs a gradient.
        over_saved: nobody reads `saved` afterwards, so that its memory may serve.
        grad_x: (M, K); the others have their parameter's shape, grad_weights and grad_w_out its strides.
    """
    if feed_forward_whole.takes(grad.dtype):
        feed_forward_whole.backward(
            grad, x, weights, w_out, saved, act, form,
            grad_x, grad_weights, grad_biases, grad_w_out, grad_b_out, over_saved,
        )  # fmt: skip
        return
    w_out, weights = w_out.float(), [weight.float() for weight in weights]
    sums = _Sums()
    wide_weights = [sums.of(g) for g in grad_weights]
    wide_biases = [sums.of(g) for g in grad_biases]
    wide_w_out, wide_b_out = sums.of(grad_w_out), sums.of(grad_b_out)
    inner = grad_x is not None or any(g is not None for g in (*grad_weights, *grad_biases))
    for rows in _row_blocks(grad.shape[0], sum(map(len, weights))):
        dy = grad[rows].float()
        if wide_b_out is not None:
            wide_b_out += dy.sum(0)
        dh = dy @ w_out if inner else None
        h, dzs = derive([t[rows].float() for t in saved], dh, act, form) if saved else (None, [])
        if wide_w_out is not None and h is not None:
            wide_w_out.addmm_(dy.t(), h)
        if grad_x is not None:
            wide_x = dzs[0] @ weights[0]
            for dz, weight in zip(dzs[1:], weights[1:], strict=True):
                wide_x.addmm_(dz, weight)
            grad_x[rows] = wide_x
        for dz, wide_weight, wide_bias in zip(dzs, wide_weights, wide_biases, strict=False):
            if wide_weight is not None and x is not None:
                wide_weight.addmm_(dz.t(), x[rows].float())
            if wide_bias is not None:
                wide_bias += dz.sum(0)
    sums.round()


class _Sums:
    """float32 sums over blocks: the gradient itself, or what is rounded to it in the end."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def of(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        if grad.dtype == torch.float32:
            return grad.zero_()
        wide = torch.zeros_like(grad, dtype=torch.float32)
        self.pairs.append((grad, wide))
        return wide

    def round(self) -> None:
        for narrow, wide in self.pairs:
            narrow.copy_(wide)


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()
