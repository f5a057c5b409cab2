"""Rotary position embedding on a CPU: ATen over views of the pairs, a chunk of rows widened at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusekit.kernels.rotation import MAX_LEADING, pairs_of, rows_of


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, rotary: int, interleaved: bool, back: bool = False
) -> None:
    """Turn float32 x into out, of its shape; ATen, four passes over half the features."""
    a, b = pairs_of(x, rotary, interleaved)
    out_a, out_b = pairs_of(out, rotary, interleaved)
    (cos_a, cos_b), (sin_a, sin_b) = (pairs_of(t, rotary, interleaved) for t in (cos, sin))
    torch.mul(a, cos_a, out=out_a).addcmul_(b, sin_b if back else sin_a, value=1 if back else -1)
    torch.mul(b, cos_b, out=out_b).addcmul_(a, sin_a if back else sin_b, value=-1 if back else 1)
    if rotary < x.shape[-1]:
        out[..., rotary:].copy_(x[..., rotary:])


CHUNK = 1 << 18  # elements widened at once: 1 MiB of float32


def chunks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views (n0, n1, n2, features) of a part of x's rows in memory order, and of what broadcasts to it."""
    rows = rows_of(x)
    _, n1, n2 = rows.sizes

    def ordered(t: Tensor) -> Tensor:
        permuted = t.expand(*x.shape[:-1], t.shape[-1]).permute(*rows.order, -1)
        return permuted.view(*[1] * (MAX_LEADING - len(rows.order)), *permuted.shape)

    views = [ordered(t) for t in (x, *others)]
    whole = max(1, n1 * n2 * x.shape[-1])
    if whole <= CHUNK:
        yield from zip(*(v.split(CHUNK // whole) for v in views), strict=True)
    else:
        for outer in zip(*(v.split(1) for v in views), strict=True):
            step = max(1, CHUNK * n1 // whole)
            yield from zip(*(v.split(step, 1) for v in outer), strict=True)
