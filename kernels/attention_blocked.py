r"""`attention` on a CPU by blocks of queries: bands, documents, ALiBi, caps, sinks, the gradient of a bias.

A block of queries meets only the keys that its band, its documents and global tokens reach. Torch's
flash kernel computes a block where it can. A sink s changes its results by a factor only:
    y' = y sigmoid(lse - s),  lse' = log(exp(lse) + exp(s)),
and from y' and lse' its backward pass gives the right gradients. Capped scores, the gradient of a bias and
dropout are matmuls and a softmax, a batch element at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fusekit.kernels import attention_native as native
from fusekit.kernels.attention_block_mask import block_mask, key_span, row_blocks
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_span import Span, add, part, split, write

ROWS = 128  # queries in a block that flash computes
SCORES = 1 << 20  # of a block that is written out


def forward(q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """out (B, H, Tq, Dv) in (B, Tq, H, Dv) memory, and stats as `attention_native` leaves them."""
    B, H, Tq, _ = q.shape
    out = q.new_zeros((B, Tq, H, v.shape[-1])).transpose(1, 2)
    two = form.mask is not None and form.mask.dtype != torch.bool
    stats = q.new_zeros((1 + two, B, H, Tq), dtype=torch.float32)
    if _flash_fits(q, k, v, form):
        # The factor of sinks comes after: a result in 16 bits would be rounded twice.
        dtype = torch.float32 if form.sinks is not None else native._compute_dtype(q.dtype)
        operands = native._cast(dtype, q, k, v)
        for batch, rows, keys, mask in _flash_blocks(q, k, form):
            block = [part(x[batch], 2, r) for x, r in zip(operands, (rows, keys, keys), strict=True)]
            added = native._additive(mask, q, dtype)
            result, lse = native._flash(*block, 0.0, False, attn_mask=added, scale=form.scale)
            if form.sinks is not None:
                result, lse = _with_sinks(result, lse, form.sinks)
            write(out[batch], 2, rows, result)
            write(stats[0, batch], 2, rows, lse)
        return out, stats
    for b, rows, keys in _written_blocks(q, k, form):
        written = _Block(q, k, v, form, b, rows, keys)
        p = native._drop(written.p, written.kept, form.dropout)
        write(out[b], 1, rows, written.by_head(p @ written.v))
    return out, stats


def backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, form: Form,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv, each laid out as (B, T, H, D); the gradients of an additive mask and of sinks, or None."""
    sums = [x.new_zeros(x.transpose(1, 2).shape, dtype=torch.float32).transpose(1, 2) for x in (q, k, v)]
    dsinks = None if form.sinks is None else torch.zeros(form.sinks.shape, dtype=torch.float32)
    dmask = None
    if bias_grad:
        assert form.mask is not None
        dmask = torch.zeros((1,) * (4 - form.mask.ndim) + tuple(form.mask.shape), dtype=torch.float32)
    large = bool((stats[0].abs() > native.LARGEST_LSE).any())
    if _flash_fits(q, k, v, form) and not (bias_grad or large):
        _flash_backward(grad_output, q, k, v, out, stats[0], form, sums, dsinks)
    else:
        for b, rows, keys in _written_blocks(q, k, form, whole=bias_grad):
            _Block(q, k, v, form, b, rows, keys).backward(grad_output, sums, dmask, dsinks)
    dq, dk, dv = (_rounded(total, x.dtype) for x, total in zip((q, k, v), sums, strict=True))
    if dmask is not None and form.mask is not None:
        dmask = dmask.view(form.mask.shape).to(form.mask.dtype)
    if dsinks is not None and form.sinks is not None:
        dsinks = dsinks.to(form.sinks.dtype)
    return dq, dk, dv, dmask, dsinks


def _rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """In dtype and in (B, T, H, D) memory."""
    return total.transpose(1, 2).to(dtype).transpose(1, 2)


def _flash_fits(q: Tensor, k: Tensor, v: Tensor, form: Form) -> bool:
    return form.softcap is None and native._flash_fits(q, k, v, form.dropout)


def _flash_blocks(q: Tensor, k: Tensor, form: Form) -> Iterator[tuple[slice, Span, Span, Tensor | None]]:
    """(batch elements, queries, keys, mask) of each block with any key."""
    (B, _, Tq, _), Tk = q.shape, k.shape[-2]
    by_element = form.is_by_element  # then other blocks are skipped in each
    step = ROWS if form.is_banded or form.causal or by_element or form.slopes is not None else Tq
    for b in range(B) if by_element else (None,):
        for rows, is_global in row_blocks(form, b, Tq, step):
            keys = key_span(form, b, rows, is_global, Tk)
            if len(keys):
                batch = slice(None) if b is None else slice(b, b + 1)
                yield batch, rows, keys, block_mask(form, b, rows, keys)


def _with_sinks(result: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    s = sinks.to(torch.float32)[:, None]
    return result * torch.sigmoid(lse - s)[..., None].to(result.dtype), torch.logaddexp(lse, s)


def _flash_backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, form: Form,
    sums: list[Tensor], dsinks: Tensor | None,
) -> None:  # fmt: skip
    # Sums over blocks, each rounded to 16 bits, would be off by more than 2.5 floors. B=1 H=8 T=2048 bfloat16
    # on a machine with 16-bit matrix units, one thread, window of 512: 188 ms in bfloat16, 119 in float32.
    dtype = torch.float32
    operands = native._cast(dtype, grad_output, q, k, v, out)
    for batch, rows, keys, mask in _flash_blocks(q, k, form):
        ranges = (rows, rows, keys, keys, rows)
        block = [part(x[batch], 2, r) for x, r in zip(operands, ranges, strict=True)]
        own = part(lse[batch], 2, rows)
        added = native._additive(mask, q, dtype)
        if q.dtype != dtype:  # what was rounded shows where dS cancels: attention_native.py
            block[4], given = native._flash(*block[1:4], 0.0, False, attn_mask=added, scale=form.scale)
            if form.sinks is not None:
                block[4], _ = _with_sinks(block[4], given, form.sinks)
        grads = native._flash_backward(
            *block, own.contiguous(), 0.0, False, attn_mask=added, scale=form.scale
        )
        for total, grad, r in zip(sums, grads, (rows, keys, keys), strict=True):
            add(total[batch], 2, r, grad)
        if dsinks is not None and form.sinks is not None:
            p = torch.exp(form.sinks.to(torch.float32)[:, None] - own)
            dsinks -= (p * (block[0] * block[4]).sum(-1)).sum((0, 2))


def _written_blocks(
    q: Tensor, k: Tensor, form: Form, whole: bool = False
) -> Iterator[tuple[int, Span, Span]]:  # fmt: skip
    """(batch element, queries, keys) of each block with any key; of global tokens all keys, where `whole`."""
    (B, H, Tq, _), Tk = q.shape, k.shape[-2]
    met = min(Tk, form.window + ROWS) if form.window is not None and not form.has_globals else Tk
    step = max(1, min(Tq, SCORES // max(1, H * met)))
    for b in range(B):
        if whole and form.has_globals:
            yield from ((b, rows, range(Tk)) for rows, _ in split(None, Tq, step) if Tk)
            continue
        for rows, is_global in row_blocks(form, b, Tq, step):
            keys = key_span(form, b, rows, is_global, Tk)
            if len(keys):
                yield b, rows, keys


class _Block:
    """Scores and probabilities of some queries of one batch element, in float32, (Hkv, G rows, keys)."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, form: Form, b: int, rows: Span, keys: Span
    ) -> None:  # fmt: skip
        self.heads, self.kv_heads, self.form = q.shape[1], k.shape[1], form
        self.b, self.rows, self.keys = b, rows, keys
        self.q = native._grouped(part(q[b], 1, rows), self.kv_heads)
        self.k, self.v = (native._precise(part(x[b], 1, keys)) for x in (k, v))
        scores = (self.q @ self.k.transpose(-1, -2)).mul_(form.scale)
        self.tanh = None
        if form.softcap is not None:
            self.tanh = scores.div_(form.softcap).tanh_()
            scores = self.tanh * form.softcap
        scores = self._masked(scores.view(self.heads, len(rows), len(keys)))
        self.p, self.sink_p = _softmax(scores, form.sinks)
        self.p = self.p.view(self.q.shape[0], -1, len(keys))
        self.kept = self._kept((q.shape[0], self.heads, q.shape[-2], k.shape[-2]))

    def _masked(self, scores: Tensor) -> Tensor:
        mask = block_mask(self.form, self.b, self.rows, self.keys)
        if mask is None:
            return scores
        mask = mask[0] if mask.ndim == 4 else mask
        return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask

    def _kept(self, sizes: tuple[int, int, int, int]) -> Tensor | None:
        """Of the numbers that the whole (B, H, Tq, Tk) draws, those of this block."""
        if self.form.dropout == 0.0:
            return None
        _, H, Tq, Tk = sizes
        seed, rows, keys = self.form.seed, self.rows, self.keys
        assert seed is not None, "supports() refuses dropout without a seed"
        kept = torch.empty(H, len(rows), len(keys), dtype=torch.bool)
        for h in range(H):
            above = (self.b * H + h) * Tq
            draws = self._drawn(seed, above, rows, Tk)
            kept[h] = part(draws, 1, keys) >= self.form.dropout
        return kept.view(self.p.shape)

    def _drawn(self, seed: Tensor, above: int, rows: Span, Tk: int) -> Tensor:
        """The numbers of these rows, (rows, Tk), of a head that `above` rows are in front of."""
        runs = [range(row, row + 1) for row in rows.tolist()] if isinstance(rows, Tensor) else [rows]
        draws = [
            native.philox.uniform(
                seed, len(run) * Tk, self.k.device, start=(above + run.start) * Tk,
                seed_offset=self.form.seed_offset,
            )
            for run in runs
        ]  # fmt: skip
        return torch.cat(draws).view(-1, Tk)

    def by_head(self, x: Tensor) -> Tensor:
        return native._shared(x, self.heads)

    def backward(
        self, grad_output: Tensor, sums: list[Tensor], dmask: Tensor | None, dsinks: Tensor | None
    ) -> None:
        dq, dk, dv = (total[self.b] for total in sums)
        dropout = self.form.dropout
        dy = native._grouped(part(grad_output[self.b], 1, self.rows), self.kv_heads)
        add(dv, 1, self.keys, native._drop(self.p, self.kept, dropout).transpose(-1, -2) @ dy)
        dp = native._drop(dy @ self.v.transpose(-1, -2), self.kept, dropout)
        delta = (self.p * dp).sum(-1, keepdim=True)
        ds = self.p * (dp - delta)
        if dsinks is not None and self.sink_p is not None:
            dsinks -= (self.sink_p * delta.view(self.sink_p.shape)).sum((1, 2))
        if dmask is not None:
            self._add_to(dmask, ds.view(self.heads, len(self.rows), len(self.keys)))
        if self.tanh is not None:
            ds = ds.mul_(1.0 - self.tanh.square_())
        ds = ds.mul_(self.form.scale)
        add(dq, 1, self.rows, self.by_head(ds @ self.k))
        add(dk, 1, self.keys, ds.transpose(-1, -2) @ self.q)

    def _add_to(self, dmask: Tensor, ds: Tensor) -> None:
        """The sum of dS over the dimensions along which the mask is repeated."""
        repeated = [d for d in range(3) if dmask.shape[d + 1] == 1]
        ds = ds.sum(repeated, keepdim=True) if repeated else ds
        assert isinstance(self.rows, range) and isinstance(self.keys, range), "of them parts are views"
        own = dmask[self.b if dmask.shape[0] > 1 else 0]
        own = part(own, 1, self.rows) if dmask.shape[2] > 1 else own
        own = part(own, 2, self.keys) if dmask.shape[3] > 1 else own
        own += ds


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """P, zero in a row without keys, and the share of each row's sink, (H, rows, 1)."""
    largest = scores.amax(-1, keepdim=True)
    empty = largest == -math.inf
    if sinks is None:
        return scores.softmax(-1).masked_fill_(empty, 0.0), None
    logits = sinks.to(torch.float32)[:, None, None]
    largest = torch.maximum(largest, logits).masked_fill_(empty & (logits == -math.inf), 0.0)
    p, sink_p = torch.exp(scores - largest), torch.exp(logits - largest)
    total = p.sum(-1, keepdim=True).add_(sink_p)
    total.masked_fill_(total == 0.0, 1.0)
    return p.div_(total), sink_p / total
