r"""Two products of one operand in one kernel, and what a gated layer makes of them.

    gate = x @ w_gate.T + b_gate
    up = x @ w_up.T + b_up
    h = act(gate) * up          x (M, K), gate, up and h (M, H), float32 accumulators

Each tile of x is read once for both. gate and up are stored only where backward needs them, and h comes from
the accumulators, before they are rounded. A packed weight is two views of one.

Which configuration runs is the tables' choice: rows with the epilogue "gated" (config_table.py), which two
accumulators in the registers of one leave small.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusekit.kernels import config_table, gemm
from fusekit.kernels._triton import tl, triton
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.config_table import Config
from fusekit.kernels.gemm import GROUP
from fusekit.kernels.gemm_kernels import _place
from fusekit.kernels.hidden_form import parts
from fusekit.kernels.launch import Plans, Repeated, kind_of


class Plan(NamedTuple):
    """integers: the kernel's sizes and strides."""

    start: Repeated
    integers: tuple[int, ...]


_plans = Plans()


@triton.jit
def _finish(
    gate, up, rows, columns, M, N, gate_bias_ptr, up_bias_ptr, gate_ptr, up_ptr, h_ptr, stride_zm,
    ACT: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile."""
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    wide_rows, wide_columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if gate_ptr is not None:
        offsets = wide_rows * stride_zm + wide_columns
        tl.store(gate_ptr + offsets, gate.to(gate_ptr.dtype.element_ty), mask=mask)
        tl.store(up_ptr + offsets, up.to(up_ptr.dtype.element_ty), mask=mask)
    h = ACT(gate) * up
    tl.store(h_ptr + wide_rows * N + wide_columns, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _finish_in_parts(
    gate, up, rows, column, M, N, gate_bias_ptr, up_bias_ptr, gate_ptr, up_ptr, h_ptr, stride_zm,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """PARTS halves the columns until what the epilogue holds fits beside both accumulators in registers."""
    if PARTS == 1:
        _finish(
            gate, up, rows, column + tl.arange(0, BLOCK_N), M, N, gate_bias_ptr, up_bias_ptr, gate_ptr,
            up_ptr, h_ptr, stride_zm, ACT,
        )  # fmt: skip
    else:
        gate_left, gate_right = _halves(gate, BLOCK_M, BLOCK_N)
        up_left, up_right = _halves(up, BLOCK_M, BLOCK_N)
        _finish_in_parts(
            gate_left, up_left, rows, column, M, N, gate_bias_ptr, up_bias_ptr, gate_ptr, up_ptr, h_ptr,
            stride_zm, ACT, BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip
        _finish_in_parts(
            gate_right, up_right, rows, column + BLOCK_N // 2, M, N, gate_bias_ptr, up_bias_ptr, gate_ptr,
            up_ptr, h_ptr, stride_zm, ACT, BLOCK_M, BLOCK_N // 2, PARTS // 2,
        )  # fmt: skip


@triton.jit
def _gated_kernel(
    x_ptr, gate_weight_ptr, up_weight_ptr, gate_bias_ptr, up_bias_ptr, gate_ptr, up_ptr, h_ptr,
    M, N, K, stride_xm, stride_xk, stride_gn, stride_gk, stride_un, stride_uk, stride_zm,
    ACT: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    block_m, block_n = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and columns past the end wrap around: what they compute is not stored.
    depth = tl.arange(0, BLOCK_K)
    wrapped = (columns % N).to(tl.int64)[None, :]
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_xm + depth[None, :] * stride_xk
    gate_ptrs = gate_weight_ptr + depth[:, None] * stride_gk + wrapped * stride_gn
    up_ptrs = up_weight_ptr + depth[:, None] * stride_uk + wrapped * stride_un
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            gate_weight = tl.load(gate_ptrs)
            up_weight = tl.load(up_ptrs)
        else:
            inside = depth < K - step * BLOCK_K
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=inside[:, None], other=0.0)
            up_weight = tl.load(up_ptrs, mask=inside[:, None], other=0.0)
        gate = tl.dot(x, gate_weight, gate, input_precision=PRECISION)
        up = tl.dot(x, up_weight, up, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        gate_ptrs += BLOCK_K * stride_gk
        up_ptrs += BLOCK_K * stride_uk

    _finish_in_parts(
        gate, up, rows, block_n * BLOCK_N, M, N, gate_bias_ptr, up_bias_ptr, gate_ptr, up_ptr, h_ptr,
        stride_zm, ACT, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


def gated_matmul(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    act: str,
    form: str,
    h: Tensor,
    saved: list[Tensor],
    tf32: bool,
    config: Config | None = None,
) -> None:
    """Compute act(gate) * up into `h`, and gate and up into `saved`.

    Args:
        x: (M, K), any strides.
        weights: (H, K) of gate and of up, any strides, or (2 H, K) of both.
        biases: (H,) or (2 H,) contiguous, or None, one for each weight.
        form: "gated" of two weights, "gate_up" or "up_gate" of one.
        h: (M, H) contiguous.
        saved: nothing, or contiguous (M, H) for each weight, (M, 2 H) where packed.
        config: instead of the table's choice, for tuning and tests.
    """
    gate_weight, up_weight = parts([weight.t() for weight in weights], form)
    gate_bias, up_bias = _bias_parts(biases, form)
    gate, up = parts(saved, form) if saved else (None, None)
    assert up_weight is not None
    tensors = (x, gate_weight, up_weight, gate_bias, up_bias, gate, up, h)
    key = (act, tf32, config, x.get_device(), x.shape, h.shape, *map(kind_of, tensors))
    plan = _plans(key, lambda: _plan(x, gate_weight, up_weight, gate, h, act, tf32, config))
    plan.start(*tensors, *plan.integers)


def _plan(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate: Tensor | None,
    h: Tensor,
    act: str,
    tf32: bool,
    config: Config | None,
) -> Plan:
    (M, K), N = x.shape, h.shape[1]
    if config is None:
        kind = "half" if x.dtype.itemsize == 2 else "tf32" if tf32 else "ieee"
        layouts = {gemm._layout(x, weight) for weight in (gate_weight, up_weight)}
        regular = gemm.aligned(x, gate_weight, up_weight) and layouts in ({"nt"}, {"nn"})
        layout = layouts.pop() if regular else "s"
        config, _ = config_table.choose(gemm._table(x), kind, layout, "gated", M, N, K, False)
    start = Repeated(
        _gated_kernel, (-(-M // config.m) * -(-N // config.n),), ACT=ACTIVATIONS[act].kernel,
        PRECISION="tf32" if tf32 else "ieee", EVEN_K=K % config.k == 0, BLOCK_M=config.m, BLOCK_N=config.n,
        BLOCK_K=config.k, GROUP=GROUP, PARTS=config.parts, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    strides = (*x.stride(), *gate_weight.t().stride(), *up_weight.t().stride())
    return Plan(start, (M, N, K, *strides, 0 if gate is None else gate.stride(0)))


def _bias_parts(biases: list[Tensor | None], form: str) -> tuple[Tensor | None, Tensor | None]:
    if form == "gated":
        return biases[0], biases[1]
    return (None, None) if biases[0] is None else parts([biases[0]], form)
