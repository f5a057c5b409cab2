"""The CPU path of linear_cross_entropy: products of a chunk of rows, softmax over rows that stay in cache.

Where the processor multiplies x's low precision dtype it does, with logits in float32 all the same: in
cpu/linear.cpp, or, since other products come back rounded, as one product and a second one for what was
rounded away. Elsewhere everything between x and the float32 results is
float32: no rounding at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import cpu_library, linear_cpu
from fusekit.kernels.linear_cpu import multiplies

CHUNK_BYTES = 8 << 20  # of float32 logits: the third-level cache, and enough rows for an efficient product
# Of bfloat16 gradients of logits, at least; or what the float32 sums of the weight's gradient take anyway,
# since every chunk adds to all of them.
COMPILED_CHUNK_BYTES = 32 << 20
PASS_BYTES = 1 << 20  # of logits that the softmax's passes visit in turn: the second-level cache


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignored: int, smoothing: float,
    losses: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
    share: float = 1.0,
) -> None:  # fmt: skip
    """Write each row's loss, and the gradients of their sum, times `share`, that are not None.

    Args:
        x: (M, K); weight: (V, K); bias: (V,); any strides.
        targets: (M,) int64.
        losses: (M,) float32, zeros; grad_x (M, K), grad_weight (V, K), grad_bias (V,): float32, contiguous.

    Raises:
        IndexError: a target is neither a class nor `ignored`.
    """
    (M, _), V = x.shape, weight.shape[0]
    counts = targets != ignored
    safe = targets.where(counts, 0)
    if M and not bool(((safe >= 0) & (safe < V)).all()):
        wrong = next(t for t in safe.tolist() if not 0 <= t < V)
        raise IndexError(f"linear_cross_entropy: target {wrong} is none of the {V} classes")
    dtype = x.dtype if multiplies(x.dtype) else torch.float32
    weight, wide_bias = weight.to(dtype), None if bias is None else bias.float()
    wanted = any(g is not None for g in (grad_x, grad_weight, grad_bias))
    if x.numel() and linear_cpu.compiled(x, weight, "none"):
        settings = (safe, counts, smoothing)
        _forward_compiled(x, weight, wide_bias, *settings, losses, grad_x, grad_weight, grad_bias, share)
        return
    rows = min(M, max(64, CHUNK_BYTES // (4 * V)))
    buffer = torch.empty((rows, V), dtype=torch.float32)
    for start in range(0, M, max(rows, 1)):
        here = slice(start, min(start + rows, M))
        h, z = x[here].to(dtype), buffer[: here.stop - start]
        _logits(h, weight, wide_bias, z)
        _softmax(z, safe[here], counts[here], smoothing, losses[here], share if wanted else None)
        if not wanted:
            continue
        dz, hit = z.to(dtype), safe[here]
        # What the target's element lost in rounding, as in `_forward_compiled`: always the same way, -1 for
        # all that is nearer than half a unit to it.
        rest = None if dtype == torch.float32 else z.gather(1, hit[:, None]) - dz.gather(1, hit[:, None])
        if grad_x is not None:
            _product(dz, weight, grad_x[here], first=True)
            if rest is not None:
                grad_x[here].addcmul_(weight[hit].float(), rest)
        if grad_weight is not None:
            _product(dz.t(), h, grad_weight, first=start == 0)
            if rest is not None:
                grad_weight.index_add_(0, hit, h.float() * rest)
        if grad_bias is not None:
            total = z.sum(0)
            grad_bias.add_(total) if start else grad_bias.copy_(total)


def _forward_compiled(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, counts: Tensor, smoothing: float,
    losses: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
    share: float = 1.0,
) -> None:  # fmt: skip
    """As forward, product and softmax in one call: float32 logits of a block of rows exist at a time."""
    (M, K), V = x.shape, weight.shape[0]
    weight = linear_cpu.adjacent(weight)
    wanted = any(g is not None for g in (grad_x, grad_weight, grad_bias))
    chunk = COMPILED_CHUNK_BYTES if grad_weight is None else max(COMPILED_CHUNK_BYTES, 4 * V * K)
    most = max(64, chunk // (2 * V))
    rows = -(-M // -(-M // most))
    buffer = x.new_empty((rows, V)) if wanted else None
    for start in range(0, M, rows):
        here = slice(start, min(start + rows, M))
        h, dz = linear_cpu.adjacent(x[here]), None if buffer is None else buffer[: here.stop - start]
        rest = x.new_empty(len(h), dtype=torch.float32)
        cpu_library.call(
            "linear_softmax", h, h.stride(0), weight, weight.stride(0), bias, targets[here], counts[here],
            smoothing, share, losses[here], dz, rest, len(h), V, K,
        )  # fmt: skip
        if dz is None:
            continue
        # What the target's element of dz lost in rounding: beside its -1, p has few bits left. Taking off the
        # -1 in float32 instead would leave a rounded product that it cancels, once p is what the data are.
        hit = targets[here]
        if grad_x is not None:
            _product(dz, weight, grad_x[here], first=True)
            grad_x[here].addcmul_(weight[hit].float(), rest[:, None])
        if grad_weight is not None:
            _product(dz.t(), h, grad_weight, first=start == 0)
            grad_weight.index_add_(0, hit, h.float() * rest[:, None])
        if grad_bias is not None:
            total = linear_cpu.column_sums(dz).index_add_(0, hit, rest)
            grad_bias.add_(total) if start else grad_bias.copy_(total)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> None:
    if bias is not None and h.dtype == torch.float32:
        torch.addmm(bias, h, weight.t(), out=z)
        return
    rounded = h @ weight.t()
    z.copy_(rounded)
    if h.dtype != torch.float32:  # what the rounding took: exp would make percents of it
        z += torch.addmm(rounded, h, weight.t(), beta=-1)
    if bias is not None:
        z += bias


def _product(a: Tensor, b: Tensor, total: Tensor, *, first: bool) -> None:
    """a @ b to float32 `total`, or added to it."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _softmax(
    logits: Tensor, targets: Tensor, counts: Tensor, smoothing: float, losses: Tensor, share: float | None
) -> None:
    """The losses of rows of logits (R, V); the logits become the gradients of `share` times their sum."""
    V = logits.shape[1]
    size = max(1, PASS_BYTES // (4 * V))
    parts = (t.split(size) for t in (logits, targets[:, None], counts[:, None], losses))
    for z, target, count, loss in zip(*parts, strict=True):
        top = z.amax(1, keepdim=True)
        row_loss = top - (1.0 - smoothing) * z.gather(1, target)
        if smoothing:
            row_loss -= smoothing * z.mean(1, keepdim=True)
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        row_loss += total.log()
        loss.copy_(row_loss.masked_fill_(~count, 0.0).squeeze(1))
        if share is None:
            continue
        scale = count.to(torch.float32) * share
        z.mul_(scale / total)
        if smoothing:
            z.sub_(scale * (smoothing / V))
        z.scatter_add_(1, target, scale * (smoothing - 1.0))
