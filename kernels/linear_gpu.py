r"""A linear layer on a GPU: one product forward; backward through its activation, then two products.

    dz = dy * act'(z)
    grad_weight = dz.T @ x,   grad_bias = column sums of dz      M rows (tokens), N output, K input features

`dact` is the pass that makes dz; the bias gradient's partial sums ride on it. Where there is no activation,
dz is dy and needs no pass: then they ride on the product for the weight's gradient, which reads dz anyway,
but for odd strides and weights stored by columns.
Every sum has a fixed order: no atomics, the same bits each run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.gemm import can_sum_rows, matmul, sum_partials
from fusekit.kernels.launch import Plans, Repeated, kind_of

DACT_BLOCK_M, DACT_BLOCK_N, DACT_WARPS = 16, 128, 4
DACT_PROGRAMS = 1024  # about 8 of 4 warps for each of 132 multiprocessors

_dacts = Plans()


@triton.jit
def _dact_kernel(
    dy_ptr, saved_ptr, dz_ptr, partial_ptr, M, N, rows_per_program, stride_dy,
    BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * rows_per_program
    last = min(first + rows_per_program, M)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for row in range(first, last, BLOCK_M):
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < last)[:, None] & (columns < N)[None, :]
        offsets = rows[:, None] * N + columns[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dy + columns[None, :]
        dz = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        if saved_ptr is not None:
            saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dz = BACKWARD(dz, saved)
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            total += tl.sum(dz, axis=0)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * N + columns, total, mask=columns < N)


def dact(grad: Tensor, saved: Tensor | None, act: str, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """dz (M, N), grad itself where act is "none", and the float32 (P, N) partial sums of its columns."""
    if saved is None and not with_bias:
        return grad, None
    M, N = grad.shape
    key = act, with_bias, M, N, grad.get_device(), kind_of(grad), kind_of(saved)
    start, programs, rows = _dacts(key, lambda: _plan_dact(M, N, act))
    dz = None if saved is None else torch.empty((M, N), dtype=grad.dtype, device=grad.device)
    partials = grad.new_empty((programs, N), dtype=torch.float32) if with_bias else None
    start(grad, saved, dz, partials, M, N, rows, grad.stride(0))
    return (grad if dz is None else dz), partials


def _plan_dact(M: int, N: int, act: str) -> tuple[Repeated, int, int]:
    """The start, the programs that share the rows, and the rows of each."""
    programs, rows = share_rows(M, N, DACT_BLOCK_M, DACT_BLOCK_N, DACT_PROGRAMS)
    start = Repeated(
        _dact_kernel, (triton.cdiv(N, DACT_BLOCK_N), programs), BACKWARD=ACTIVATIONS[act].kernel_backward,
        BLOCK_M=DACT_BLOCK_M, BLOCK_N=DACT_BLOCK_N, num_warps=DACT_WARPS,
    )  # fmt: skip
    return start, programs, rows


def share_rows(M: int, N: int, block_m: int, block_n: int, most: int) -> tuple[int, int]:
    """How many programs share M rows where `most` programs share all, and the rows of each."""
    steps = triton.cdiv(M, block_m)
    per_program = triton.cdiv(steps, max(1, min(steps, most // max(triton.cdiv(N, block_n), 1))))
    return max(1, triton.cdiv(steps, max(1, per_program))), per_program * block_m


def weight_gradients(
    dz: Tensor, x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None, tf32: bool
) -> None:
    """Write the gradients of a weight and of a bias; None is not wanted.

    Args:
        dz: (M, N), its rows contiguous.
        x: (M, K), any strides; None where grad_weight is.
        grad_weight: (N, K), any strides.
        grad_bias: (N,) contiguous.
    """
    rides = False
    if grad_weight is not None and x is not None:
        rides = grad_bias is not None and can_sum_rows(dz.t(), x, grad_weight)
        matmul(dz.t(), x, grad_weight, tf32=tf32, row_sums=grad_bias if rides else None)
    if grad_bias is not None and not rides:
        partials = dact(dz, None, "none", True)[1]
        assert partials is not None
        sum_partials(partials, grad_bias)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    tf32: bool,
    y: Tensor,
    z: Tensor | None,
) -> None:
    """Write act(x @ weight.T + bias) + residual to y, and the pre-activation to z; as in linear_cpu.py."""
    bias = None if bias is None else bias.contiguous()
    matmul(x, weight.t(), y, bias=bias, act=act, residual=residual, z=z, tf32=use_tf32(x, tf32))


def backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    saved: Tensor | None,
    act: str,
    tf32: bool,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients that are not None, as in linear_cpu.py."""
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    dz = grad
    if saved is not None:
        dz, partials = dact(grad, saved, act, grad_bias is not None)
        if partials is not None and grad_bias is not None:
            sum_partials(partials, grad_bias)
            grad_bias = None
    tf32 = use_tf32(dz, tf32)
    if grad_input is not None:
        matmul(dz, weight, grad_input, tf32=tf32)
    weight_gradients(dz, x, grad_weight, grad_bias, tf32)


def asks_tf32(x: Tensor | list[Tensor], *_: Any) -> bool:
    """Whether products of x, or of each of them, round to tf32 because PyTorch's switch is on."""
    return use_tf32(x if isinstance(x, Tensor) else x[0], False)


def use_tf32(x: Tensor, tf32: bool) -> bool:
    """Whether a product of x rounds its operands to tf32: asked for, or PyTorch's own switch is on."""
    return x.dtype == torch.float32 and (tf32 or torch.backends.cuda.matmul.fp32_precision == "tf32")
