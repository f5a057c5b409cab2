"""add_layer_norm and add_rms_norm kernels: row loops, odd widths, strides, absent parts, large offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusekit.kernels import OPS, row_reduction
from fusekit.kernels.op import DTYPES, Op
from fusekit.kernels.parity import check, deterministic, longest_sum, results_and_grads, widen

NORMS = {"add_layer_norm": OPS["add_layer_norm"], "add_rms_norm": OPS["add_rms_norm"]}
norms = pytest.mark.parametrize("op", NORMS.values(), ids=NORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def two_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program of a backward pass then loops over several row blocks, as on a large input."""
    monkeypatch.setattr(row_reduction, "multiprocessors", lambda x: 2)


def draw(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator).mul_(16).round_().clamp_(-127, 127).div_(16)
    return values.to("cuda", dtype).requires_grad_()


def arguments(op: Op, x: Tensor, residual: Tensor | None, weight: Tensor | None) -> tuple[Any, ...]:
    bias = None if weight is None else draw(weight.dtype, weight.numel(), seed=9)
    return (x, residual, weight, bias, 1e-5) if op is NORMS["add_layer_norm"] else (x, residual, weight, 1e-5)


def assert_parity(op: Op, args: tuple[Any, ...]) -> None:
    verdicts = check(
        results_and_grads(op.fused, args),
        results_and_grads(op.reference, args),
        results_and_grads(op.reference, widen(args)),
        dtype=args[0].dtype,
        terms=longest_sum(args),
    )
    assert all(v.ok for v in verdicts), "\n".join(map(str, verdicts))


@norms
@dtypes
@pytest.mark.parametrize("M, N", [(61, 257), (50, 64), (13, 1030)])
def test_programs_loop_over_row_blocks(
    op: Op, dtype: torch.dtype, M: int, N: int, two_programs: None
) -> None:
    weight = draw(torch.float32 if M == 50 else dtype, N)
    assert_parity(op, arguments(op, draw(dtype, M, N), draw(dtype, M, N, seed=1), weight))


@norms
@pytest.mark.parametrize("N", [1, 5, 16, 100, 1024, 4095])
def test_widths(op: Op, N: int) -> None:
    args = arguments(op, draw(torch.float16, 5, N), draw(torch.float16, 5, N, seed=1), draw(torch.float16, N))
    if N > 1:
        return assert_parity(op, args)
    results, expected = results_and_grads(op.fused, args), results_and_grads(op.reference, args)
    for name, result in results.items():  # one column: a - mean(a) is zero, so errors have no scale
        torch.testing.assert_close(result, expected[name], rtol=1e-2, atol=1e-2)


@norms
@dtypes
def test_absent_residual_and_weight(op: Op, dtype: torch.dtype, two_programs: None) -> None:
    assert_parity(op, arguments(op, draw(dtype, 13, 200), None, None))
    assert_parity(op, arguments(op, draw(dtype, 13, 200), None, draw(dtype, 200)))
    assert_parity(op, arguments(op, draw(dtype, 13, 200), draw(dtype, 13, 200, seed=1), None))


@norms
@pytest.mark.parametrize("frozen", [(0, 1), (1,), (2,), (2, 3)], ids=str)
def test_frozen_inputs(op: Op, frozen: tuple[int, ...]) -> None:
    x, residual, weight = (draw(torch.bfloat16, *s, seed=len(s)) for s in ((6, 72), (6, 72), (72,)))
    args = arguments(op, x, residual, weight)
    for i in frozen:
        if isinstance(args[i], Tensor):
            args[i].requires_grad_(False)
    assert_parity(op, args)


@norms
def test_row_strides(op: Op) -> None:
    dtype = torch.bfloat16
    sliced = draw(dtype, 9, 150).detach()[:, 3:140].requires_grad_()
    every_other = draw(dtype, 18, 137).detach()[::2].requires_grad_()
    transposed = draw(dtype, 137, 9).detach().t().requires_grad_()
    repeated = draw(dtype, 1, 137).detach().expand(9, 137)
    weight = draw(dtype, 274).detach()[::2].requires_grad_()
    assert_parity(op, arguments(op, sliced, every_other, weight))
    assert_parity(op, arguments(op, transposed, repeated, weight))


@norms
def test_strided_gradients(op: Op) -> None:
    x, residual = draw(torch.float32, 7, 40), draw(torch.float32, 7, 40, seed=1)
    args = arguments(op, x, residual, draw(torch.float32, 40))
    dy, dh = draw(torch.float32, 7, 50).detach()[:, :40], draw(torch.float32, 40, 7).detach().t()
    for dh_or_none in (dh, None):
        grads = []
        for fn in (op.fused, op.reference):
            y, h = fn(*args)
            outputs, grad_outputs = ([y], [dy]) if dh_or_none is None else ([y, h], [dy, dh])
            grads.append(torch.autograd.grad(outputs, (x, residual), grad_outputs))
        torch.testing.assert_close(*grads)


@norms
def test_bitwise_equal_runs(op: Op, two_programs: None) -> None:
    x, residual = draw(torch.bfloat16, 21, 96), draw(torch.bfloat16, 21, 96, seed=1)
    args = arguments(op, x, residual, draw(torch.float32, 96))
    assert deterministic(op.fused, args)


@norms
def test_too_many_columns_are_refused(op: Op) -> None:
    x = torch.empty(1, row_reduction.MAX_COLUMNS + 1, device="cuda")
    with pytest.raises(ValueError, match="columns exceed"):
        op.fused(*arguments(op, x, None, None))
