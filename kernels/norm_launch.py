"""What the norms of a residual sum share: their outputs, and the starts of their kernels over rows.

A forward kernel takes x, residual, the parameters, y, h, the row statistics; strides of x and residual; M, N
and what is its own. A backward kernel takes dy, dh, h, the statistics, weight, dx, the parameters' partial
rows; strides of dy, dh and h; M, N and what is its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.launch import launch
from fusekit.kernels.row_reduction import RowPlan, as_rows, reduce_partials, row_plan


def empty_outputs(x: Tensor, residual: Tensor | None, statistics: int) -> tuple[Tensor, ...]:
    """y, h (empty where there is no residual), and so many float32 numbers a row."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    M = math.prod(x.shape[:-1])
    return y, h, *(x.new_empty(M, dtype=torch.float32) for _ in range(statistics))


def empty_grads(h: Tensor, parameters: Sequence[Tensor | None], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised gradients of h and of the parameters; an empty tensor where one is not needed."""
    return tuple(
        h.new_empty(0)
        if t is None or not need
        else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip((h, *parameters), needed, strict=True)
    )


def start_forward(
    kernel: Any,
    x: Tensor,
    residual: Tensor | None,
    parameters: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    *own: float,
    **constants: Any,
) -> None:
    """outputs: y, h and the statistics, and what else the kernel writes."""
    x_rows, residual_rows = as_rows(x), None if residual is None else as_rows(residual)
    plan = row_plan(x_rows, 1 if residual is None else 2, per_multiprocessor=2)
    launch(
        kernel, (plan.programs,), x_rows, residual_rows, *map(_contiguous, parameters), *outputs,
        x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), *x_rows.shape, *own,
        **constants, **_tiles(plan),
    )  # fmt: skip


def start_backward(
    kernel: Any,
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    statistics: Sequence[Tensor],
    weight: Tensor | None,
    grads: Sequence[Tensor | None],
    *own: float,
) -> None:
    """grads: dx, and those of one or two parameters; None is not needed."""
    dy_rows, h_rows, dh_rows = as_rows(dy), as_rows(h), None if dh is None else as_rows(dh)
    plan = row_plan(h_rows, 2 if dh is None else 3, per_multiprocessor=1)
    dx, *sums = grads
    partials = [
        None if t is None else h.new_empty((plan.programs, h.shape[-1]), dtype=torch.float32) for t in sums
    ]
    launch(
        kernel, (plan.programs,), dy_rows, dh_rows, h_rows, *statistics, _contiguous(weight), dx, *partials,
        dy_rows.stride(0), 0 if dh_rows is None else dh_rows.stride(0), h_rows.stride(0), *h_rows.shape, *own,
        **_tiles(plan),
    )  # fmt: skip
    absent = [None] * (2 - len(sums))
    reduce_partials([*partials, *absent], [*sums, *absent])


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _tiles(plan: RowPlan) -> dict[str, int]:
    return {
        "num_warps": plan.num_warps,
        "BLOCK_M": plan.BLOCK_M,
        "BLOCK_N": plan.BLOCK_N,
        "NUM_STAGES": plan.NUM_STAGES,
    }
