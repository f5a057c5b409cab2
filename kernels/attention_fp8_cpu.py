r"""`attention_fp8` on a CPU: blocks of queries over values behind e4m3, products in float32.

The numbers are FP8's and the speed is not: a product of two e4m3 values is exact in float32, so sums are all
that float32 rounds. A block's scores are computed again in the backward pass, and with them P, so nothing but
q, k and v is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fusekit.kernels.attention_block_mask import block_mask
from fusekit.kernels.attention_blocked import _rounded, _written_blocks
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_fp8_format import HEADROOM, round_p
from fusekit.kernels.attention_native import _grouped, _precise, _shared
from fusekit.kernels.attention_tiles import LOG2E


def forward(q: Tensor, k: Tensor, v: Tensor, form: Form, out: Tensor) -> None:
    """Write out (B, H, Tq, Dv); q, k and v are behind e4m3."""
    out.zero_()
    for b, rows, keys in _blocks(q, k, form):
        block = _Block(q, k, v, form, b, rows, keys)
        out[b, :, rows.start : rows.stop].copy_(_shared(block.p @ block.v, q.shape[1]))


def backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, each laid out as (B, T, H, D)."""
    sums = [x.new_zeros(x.transpose(1, 2).shape, dtype=torch.float32).transpose(1, 2) for x in (q, k, v)]
    for b, rows, keys in _blocks(q, k, form):
        _Block(q, k, v, form, b, rows, keys).backward(grad_output, *sums)
    dq, dk, dv = (_rounded(total, x.dtype) for x, total in zip((q, k, v), sums, strict=True))
    return dq, dk, dv


def _blocks(q: Tensor, k: Tensor, form: Form) -> Iterator[tuple[int, range, range]]:
    for b, rows, keys in _written_blocks(q, k, form):
        assert isinstance(rows, range) and isinstance(keys, range)  # without global tokens they are
        yield b, rows, keys


class _Block:
    """Probabilities behind e4m3 of some queries of one batch element, in float32, (Hkv, G rows, keys)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, form: Form, b: int, rows: range, keys: range) -> None:
        self.heads, kv_heads, self.scale = q.shape[1], k.shape[1], form.scale
        self.b, self.rows, self.keys = b, slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        self.q = _grouped(q[b, :, self.rows], kv_heads)
        self.k, self.v = (_precise(x[b, :, self.keys]) for x in (k, v))
        scores = (self.q @ self.k.transpose(-1, -2)).mul_(form.scale * LOG2E)
        mask = block_mask(form, b, rows, keys)
        if mask is not None:
            scores = scores.view(self.heads, len(rows), len(keys))
            scores = scores.masked_fill_(~(mask[0] if mask.ndim == 4 else mask), -math.inf)
            scores = scores.view(kv_heads, -1, len(keys))
        base = scores.amax(-1, keepdim=True).ceil_().sub_(HEADROOM)
        base.masked_fill_(base == -math.inf, 0.0)  # a row without keys
        p = round_p(scores.sub_(base).exp2_())
        total = p.sum(-1, keepdim=True)
        self.p = p.div_(total.masked_fill_(total == 0.0, 1.0))

    def backward(self, grad_output: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        dy = _grouped(grad_output[self.b, :, self.rows], self.k.shape[0])
        dv[self.b, :, self.keys] += self.p.transpose(-1, -2) @ dy
        dp = dy @ self.v.transpose(-1, -2)
        delta = (self.p * dp).sum(-1, keepdim=True)
        ds = dp.sub_(delta).mul_(self.p).mul_(self.scale)
        dq[self.b, :, self.rows] += _shared(ds @ self.k, self.heads)
        dk[self.b, :, self.keys] += ds.transpose(-1, -2) @ self.q
