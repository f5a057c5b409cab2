r"""Rotary position embedding of queries or keys, in one pass over memory.

    y_a = a cos - b sin,   y_b = b cos + a sin         for every pair (a, b) of the first `rotary` features

Su et al. 2021, "RoFormer", arXiv:2104.09864. Saved for backward: the tables alone. It is the rotation back,
dx = R(-angle) dy. Positions enter through the tables, as in every model.
One tensor a call, not q and k together: they have no more than the tables in common, which an 8B Llama's 32
query heads and 8 key heads outweigh 20 and 5 times, and a rule for one tensor finds q where k is cached.
Shapes: x (..., D), any strides; cos, sin broadcast to (..., rotary) or (..., rotary / 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.launch import on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.op import Op, Sample
from fusekit.kernels.rotation import (
    dense,
    dense_like,
    rotate_gpu,
    rotated,
    rows_of,
    turned_features,
    unsupported,
)
from fusekit.kernels.rotation_cpu import chunks, rotate
from fusekit.kernels.row_reduction import Draw


def reference(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, rotary: int | None = None
) -> Tensor:
    """x with its first `rotary` features turned; None: as many as the tables have columns."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return rotated(wide, cos, sin, turned_features(cos, rotary), interleaved).to(x.dtype)


def _run(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, rotary: int, order: list[int], back: bool
) -> Tensor:
    y = dense(x, order)
    if on_gpu(x):
        rotate_gpu(x, cos, sin, y, rotary, interleaved, back=back)
    elif x.dtype == torch.float32:
        rotate(x, cos.float(), sin.float(), y, rotary, interleaved, back)
    else:
        for x_rows, cos_rows, sin_rows, y_rows in chunks(x, cos.float(), sin.float(), y):
            wide = x_rows.float()
            out = torch.empty_like(wide)
            rotate(wide, cos_rows, sin_rows, out, rotary, interleaved, back)
            y_rows.copy_(out)
    return y


def _check(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, rotary: int, *_: Any) -> None:
    if reason := supports(x, cos, sin, interleaved, rotary):
        raise ValueError(f"rope: {reason}")


_turn = define(
    "rope_turn(Tensor x, Tensor cos, Tensor sin, bool interleaved, int rotary, int[] order, bool back)"
    " -> Tensor",
    _run,
    lambda x, cos, sin, interleaved, rotary, order, back: dense(x, order),
    check=_check,
    depends=lambda x, cos, sin, *_: cos.requires_grad or sin.requires_grad,
)


def _forward(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, rotary: int | None = None
) -> Tensor:
    return _turn(x, cos, sin, interleaved, turned_features(cos, rotary), rows_of(x).order, False)


class _Rope(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, rotary: int | None
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout = (
            interleaved,
            turned_features(cos, rotary),
            rows_of(x).order,
        )  # the gradient lies as x does
        return _turn(x, cos, sin, *ctx.layout, False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward("rope")
        return _turn(grad_output, *ctx.saved_tensors, *ctx.layout, True), None, None, None, None


def _fake(x: Tensor, *args: Any) -> Tensor:
    if reason := supports(x, *args):
        raise ValueError(f"rope: {reason}")
    return dense_like(x)


def supports(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, rotary: int | None = None
) -> str | None:
    """None, or why this call cannot be fused, as a sentence."""
    return unsupported(x, cos, sin, rotary, None)


fused = define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved=False, int? rotary=None) -> Tensor",
    _forward,
    _fake,
    autograd=lambda x, cos, sin, pairs=False, rotary=None: _Rope.apply(x, cos, sin, pairs, rotary),
)


def tables(
    device: torch.device | str, dtype: torch.dtype, positions: int, columns: int, repeat: str = "none"
) -> tuple[Tensor, Tensor]:
    """cos and sin (1, 1, positions, columns); repeat "halves" or "pairs" as models fill a full table."""
    pairs = columns if repeat == "none" else columns // 2
    frequency = 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    if repeat == "halves":
        angle = torch.cat((angle, angle), -1)
    elif repeat == "pairs":
        angle = angle.repeat_interleave(2, -1)
    return angle.cos().to(device, dtype)[None, None], angle.sin().to(device, dtype)[None, None]


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Both layouts, full and half tables, partial, strided, odd, empty; then a small GPT's and a Llama's."""
    draw = Draw(device, dtype)

    def heads(B: int, T: int, H: int, D: int) -> Tensor:  # what .view(B, T, H, D).transpose(1, 2) gives
        return draw(B, T, H, D).detach().transpose(1, 2).requires_grad_()

    yield Sample(args=(heads(2, 37, 3, 64), *tables(device, dtype, 37, 64, "halves")), name="halves")
    pairs = tables(device, dtype, 23, 40, "pairs")
    yield Sample(args=(heads(2, 23, 3, 40), *pairs, True), name="interleaved")
    single = tables(device, torch.float32, 19, 12)
    yield Sample(args=(heads(1, 19, 4, 24), *single, False, 24), name="half table, float32")
    by_position = tuple(t.transpose(1, 2) for t in tables(device, dtype, 11, 8))
    yield Sample(args=(draw(2, 11, 3, 16), *by_position, True, 16), name="interleaved, position before head")
    yield Sample(
        args=(heads(2, 15, 2, 80), *tables(device, dtype, 15, 20, "halves"), False, None), name="partial"
    )
    yield Sample(
        args=(heads(1, 9, 2, 10), *tables(device, dtype, 9, 3), True, 6), name="partial, interleaved"
    )
    each = tuple(draw(2, 1, 13, 32).detach() for _ in range(2))  # unequal halves, a table for each sequence
    packed = draw(2, 13, 3, 3 * 32).detach()[..., 32:64].transpose(1, 2).requires_grad_()
    yield Sample(args=(packed, *each), name="packed, own tables")
    unit = draw(2, 17, 1, 6 * 2).detach()[..., ::2].transpose(1, 2).requires_grad_()
    yield Sample(args=(unit, *tables(device, dtype, 17, 6, "halves")), name="strided features")
    yield Sample(args=(heads(0, 5, 2, 16), *tables(device, dtype, 5, 16, "halves")), name="empty")
    for B, T, H, D in (8, 256, 6, 64), (4, 2048, 32, 128):
        table = tables(device, dtype, T, D, "halves")
        yield Sample(args=(heads(B, T, H, D), *table), name=f"{B}x{T}x{H}x{D}", bench=True)


def flops(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, rotary: int | None = None) -> int:
    """Two products and a sum for every turned feature."""
    return 3 * x.numel() * turned_features(cos, rotary) // max(1, x.shape[-1])


OP = Op(fused=fused, reference=reference, samples=samples, supports=supports, flops=flops)
