"""A library's attention in the layout and the units of ours, forward and backward.

What goes from one pass to the other is the same whoever computes: the output in (B, T, H, D) memory, and each
row's log sum exp in log2 (stats of attention_kernels.py). Of a tail (attention_tail.py) no library tells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_libraries import Library
from fusekit.kernels.attention_tiles import LOG2E

Grads = tuple[Tensor, Tensor, Tensor]


def forward(library: Library, q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """out (B, H, Tq, DV) in (B, Tq, H, DV) memory, and stats."""
    (B, H, Tq, _), DV = q.shape, v.shape[-1]
    found, lse = library.run(q, k, v, form)
    out = q.new_empty((B, Tq, H, DV)).transpose(1, 2)
    stats = (lse.to(torch.float32) * LOG2E).reshape(1, B, H, Tq)
    return found if found.stride() == out.stride() else out.copy_(found), stats


def backward(
    library: Library, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, form: Form
) -> Grads:
    """dq, dk, dv in (B, T, H, D) memory, of the output and the stats of any forward pass."""
    assert library.gradient is not None
    grads = library.gradient(_rows_first(dy), q, k, v, _rows_first(out), stats[0] / LOG2E, form)
    dq, dk, dv = map(_rows_first, grads)
    return dq, dk, dv


def both(library: Library, *args: Any) -> Tensor:
    """`attention` with both passes by the library, for its trial.

    A library may remember how it went about a backward pass, and not all that this depends on: cuDNN's plans
    are kept by the strides of q, k and v and not by those of dy (attention_libraries.py). So another backward
    pass goes first, as a model beside ours may run it, whose dy lies in another order.
    """
    from fusekit.kernels.attention import _settings  # which imports this module

    q, k, v, *rest = args
    form = _settings(q, k, v, *rest)
    with torch.enable_grad():
        own = q.detach().requires_grad_()
        elsewhere, _ = library.run(own, k.detach(), v.detach(), form)
        torch.autograd.grad(elsewhere, own, torch.ones_like(elsewhere, memory_format=torch.contiguous_format))
        return _Both.apply(library, form, q, k, v)


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: Library, form: Form, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, stats = forward(library, q, k, v, form)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.library, ctx.form = library, form
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, stats = ctx.saved_tensors
        return None, None, *backward(ctx.library, dy, q, k, v, out, stats, ctx.form)


def _rows_first(x: Tensor) -> Tensor:
    """(B, H, T, D) in (B, T, H, D) memory, with no gaps."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
