r"""One matrix product for all three of a linear layer, any strides, with forward and backward epilogues.

    forward     output = dropout(act(a @ b + bias)) + residual,        row_sums = a's rows, added up
    backward    output = dropout'(a @ b) * act'(z),   h = dropout(act(z)),   grad_bias = column sums of output

a (M, K), b (K, N), float32 accumulator, one rounding. Transposes are strides, so grad_input = dz @ weight and
grad_weight = dz.T @ x are the same kernels and nothing is copied. The backward form is the grad_input of a
second linear with the first's activation behind it: h is what that second linear read, computed again.

Without an epilogue, K may be split over programs: each writes a float32 partial and a second pass adds them
in order, so the result is the same every run; so are a bias gradient's partials, one a block of rows, and
those of the sums of a's rows: of dz.T, in the product for a weight's gradient, they are the bias's.

Kernels: gemm_kernels.py. Which configuration runs: config_table.py. Everything that depends on shapes,
strides, dtypes and alignment only is settled once and kept in a plan, for the host's time counts as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels import config_table
from fusekit.kernels._triton import triton
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.config_table import Config
from fusekit.kernels.gemm_kernels import persistent_kernel, sum_kernel, tile_kernel
from fusekit.kernels.launch import Plans, Repeated, kind_of, recorded_target, recording

GROUP = 8  # block rows that neighbouring programs share
SUM_ELEMENTS = 2048  # of partial sums that one program reads at once


class Plan(NamedTuple):
    """What is settled for one kind of call.

    swapped: output is column-major, so b.T @ a.T is computed into output.T.
    integers: the kernel's sizes and strides.
    """

    start: Repeated
    integers: tuple[int, ...]
    config: Config
    splits: int
    swapped: bool


_plans = Plans()
_sums = Plans()


def matmul(
    a: Tensor,
    b: Tensor,
    output: Tensor,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    z: Tensor | None = None,
    tf32: bool = False,
    dact: str | None = None,
    h: Tensor | None = None,
    grad_bias: Tensor | None = None,
    z_scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    seed_offset: int = 0,
    row_sums: Tensor | None = None,
    config: Config | None = None,
    splits: int = 1,
) -> None:
    """Compute one of the two forms of the module's docstring into `output`.

    Args:
        a: (M, K), any strides; K may be 0.
        b: (K, N), any strides, of a's dtype.
        output: (M, N), any strides.
        bias: (N,) contiguous, added before act.
        act: of the forward form.
        residual: (M, N), any strides.
        z: (M, N) with output's strides. Forward: where a @ b + bias is stored. Backward: the same, read.
        tf32: multiply float32 through tensor cores, operands rounded to 10 mantissa bits.
        dact: the activation whose derivative at z makes this the backward form; then no bias, act, residual.
        h: (M, N) with output's strides; backward: where dropout(act(z)) is stored.
        grad_bias: (N,) contiguous; backward: where the column sums of output are stored.
        z_scale: what is stored is z_scale z; see hidden_form.z_scale.
        dropout: probability, of either form; element (i, j) is dropped by number i N + j of Philox.
        seed: one int64 element, needed where dropout is not 0.
        seed_offset: added to the seed.
        row_sums: (M,) contiguous; of a product without anything else: where the sums of a's rows are stored.
        config, splits: instead of the table's choice, for tuning and tests.
    """
    seed = seed if dropout else None
    tensors = (a, b, output, bias, residual, z, h, grad_bias, seed, row_sums)
    key = (act, dact, z_scale, tf32, config, splits, a.get_device(), a.shape, b.shape, *map(kind_of, tensors))
    plan = _plans(key, lambda: _plan(tensors, act, tf32, dact, z_scale, config, splits))
    if plan.swapped:
        a, b, output = b.t(), a.t(), output.t()
    (M, N), target = output.shape, output
    pending: list[tuple[Tensor, Tensor]] = []  # float32 partials, and where their sums go
    if plan.splits > 1:
        target = output.new_empty((plan.splits, M, N), dtype=torch.float32)
        pending.append((target, output))
    partials = sums = None
    if grad_bias is not None:
        partials = output.new_empty((-(-M // plan.config.m), N), dtype=torch.float32)
        pending.append((partials, grad_bias))
    if row_sums is not None:
        sums = output.new_empty((plan.splits * -(-N // plan.config.n), M), dtype=torch.float32)
        pending.append((sums, row_sums))
    plan.start(
        a, b, target, bias, residual, z, h, partials, seed, sums, *plan.integers, seed_offset, float(dropout)
    )
    if pending:
        sum_partials(*(tensor for pair in pending for tensor in pair))


def _plan(
    tensors: tuple[Any, ...],
    act: str,
    tf32: bool,
    dact: str | None,
    z_scale: float,
    config: Config | None,
    splits: int,
) -> Plan:
    a, b, output, _, residual, _, _, _, seed, row_sums = tensors
    plain = all(t is None for t in tensors[3:-1]) and act == "none" and dact is None
    assert row_sums is None or (plain and b.shape[1]), (
        "nothing else rides along, and there are programs to add"
    )
    swapped = plain and is_column_major(output)
    assert not (swapped and row_sums is not None), "the rows of a are columns of the swapped product's b"
    if swapped:
        a, b, output = b.t(), a.t(), output.t()
    (M, K), N = a.shape, b.shape[1]
    kind = "half" if a.dtype != torch.float32 else "tf32" if tf32 else "ieee"
    if config is None:
        layout = _layout(a, b) if aligned(a, b) else "s"
        epilogue = "plain" if plain else "dropout" if seed is not None else "backward" if dact else "forward"
        # Split partials are laid out in rows, as only a contiguous output is.
        splittable = plain and output.is_contiguous()
        config, splits = config_table.choose(_table(a), kind, layout, epilogue, M, N, K, splittable)
    backward = None if dact is None else ACTIVATIONS[dact].kernel_backward
    tiles = -(-M // config.m) * -(-N // config.n)
    strides_out = (N, 1) if splits > 1 else output.stride()
    strides = (*strides_out, *((0, 0) if residual is None else residual.stride()))
    meta: dict[str, Any] = {
        "ACT": ACTIVATIONS[dact or act].kernel,
        "DACT": backward,
        "Z_SCALE": z_scale,
        "PRECISION": "tf32" if tf32 else "ieee",
        "SPLITS": splits,
        "BLOCK_M": config.m,
        "BLOCK_N": config.n,
        "BLOCK_K": config.k,
        "GROUP": GROUP,
        "PARTS": config.parts,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.kernel == "persistent":
        a_rows, b_rows = a.stride(1) == 1, b.stride(1) == 1
        strides = (a.stride(0 if a_rows else 1), b.stride(0 if b_rows else 1), *strides)
        meta |= {"A_ROWS": a_rows, "B_ROWS": b_rows, "SPECIALISE": config.specialise}
        grid: tuple[int, ...] = (min(tiles * splits, _table(a).sms),)
        start = Repeated(persistent_kernel, grid, scratch=True, **meta)
    else:
        strides = (*a.stride(), *b.stride(), *strides)
        start = Repeated(tile_kernel, (tiles, splits), EVEN_K=K % config.k == 0, **meta)
    return Plan(start, (M, N, K, *strides), config, splits, swapped)


def is_column_major(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) != 1


def can_sum_rows(a: Tensor, b: Tensor, output: Tensor) -> bool:
    """Whether `row_sums` may ride: there are programs, they store rows, and operands load 16 bytes at once.

    Of odd strides ptxas serialises the wgmma of some kernels that sum rows besides (tf32, Triton 3.6).
    """
    if not output.numel() or is_column_major(output):
        return False
    return _layout(a, b) != "s" and aligned(a, b)


def _table(x: Tensor) -> config_table.Table:
    if recording():
        return config_table.load(recorded_target())
    return config_table.for_device(max(x.get_device(), 0))


def _layout(a: Tensor, b: Tensor) -> str:
    """Letters of a and b: n, rows contiguous and 16 bytes apart; t, columns; "s" where either is neither."""
    letters = _letter(a) + _letter(b)
    return "s" if "s" in letters or not a.shape[1] else letters


def aligned(*tensors: Tensor) -> bool:
    """Whether the tensors begin where 16 bytes load at once, which no fake tensor says of its memory."""
    return recording() or not any(t.data_ptr() & 15 for t in tensors)


def _letter(x: Tensor) -> str:
    elements = 16 // x.element_size()
    if x.storage_offset() % elements:
        return "s"
    for letter, contiguous, other in (("n", 1, 0), ("t", 0, 1)):
        apart = x.stride(other)
        if x.stride(contiguous) == 1 and apart % elements == 0 and apart >= x.shape[contiguous]:
            return letter
    return "s"


def sum_partials(
    partials: Tensor, total: Tensor, second: Tensor | None = None, second_total: Tensor | None = None
) -> None:
    """Add (P, ...) float32 partials in a fixed order into `total`, of the remaining shape and contiguous.

    second, second_total: two of their own, added up in the same launch.
    """
    sizes: tuple[int, ...] = (partials.shape[0], total.numel())
    if second is not None and second_total is not None:
        sizes += (second.shape[0], second_total.numel())
    key = (sizes, total.get_device(), kind_of(total), kind_of(second_total))
    start = _sums(key, lambda: _plan_sum(*sizes))
    start(partials, total, second, second_total, *sizes, *(0, 0)[: 4 - len(sizes)])


def _plan_sum(P: int, N: int, second_P: int = 0, second_N: int = 0) -> Repeated:
    block_p = min(32, triton.next_power_of_2(max(P, second_P, 1)))  # P is 0 of an empty batch
    block_n = SUM_ELEMENTS // block_p
    grid = (-(-N // block_n) + -(-second_N // block_n),)
    return Repeated(sum_kernel, grid, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4)
