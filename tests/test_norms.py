"""add_layer_norm and add_rms_norm on the CPU: parity of samples, bad input, what samples cannot show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusekit.kernels import OPS
from fusekit.kernels.launch import Launch, record
from fusekit.kernels.op import DTYPES, Op, Sample
from fusekit.kernels.parity import check, deterministic, longest_sum, results_and_grads, widen

NORMS = {"add_layer_norm": OPS["add_layer_norm"], "add_rms_norm": OPS["add_rms_norm"]}
norms = pytest.mark.parametrize("op", NORMS.values(), ids=NORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def arguments(op: Op, x: Tensor, residual: Tensor | None, weight: Tensor | None) -> tuple[Any, ...]:
    bias = None if weight is None else torch.linspace(-1, 1, weight.numel()).to(weight)
    return (x, residual, weight, bias, 1e-5) if op is NORMS["add_layer_norm"] else (x, residual, weight, 1e-5)


def assert_parity(op: Op, args: tuple[Any, ...], *, inherent: bool | str = False) -> None:
    verdicts = check(
        results_and_grads(op.fused, args),
        results_and_grads(op.reference, args),
        results_and_grads(op.reference, widen(args)),
        dtype=args[0].dtype,
        terms=longest_sum(args),
        inherent=inherent,
    )
    assert all(v.ok for v in verdicts), "\n".join(map(str, verdicts))


@norms
@dtypes
def test_one_rounding_where_the_residual_sum_is_exact(op: Op, dtype: torch.dtype) -> None:
    for sample in op.samples("cpu", dtype):
        # ATen rounds LayerNorm's dx before dh is added, as eager does.
        twice = op is NORMS["add_layer_norm"] and sample.args[1] is not None
        if not sample.bench:
            assert_parity(op, sample.args, inherent="grad" if twice else False)


@norms
@dtypes
def test_several_chunks_of_rows(op: Op, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(3, 601, 768, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(768, generator=generator).requires_grad_()
    assert_parity(op, arguments(op, x, residual, weight), inherent=True)


@norms
@dtypes
def test_sum_is_rounded_as_eager_rounds_it(op: Op, dtype: torch.dtype) -> None:
    x, residual = torch.randn(5, 33).to(dtype), torch.randn(5, 33).to(dtype)
    _, h = op.fused(*arguments(op, x, residual, None))
    assert torch.equal(h, x + residual)


@norms
@pytest.mark.parametrize("shape", [(17,), (1, 17), (0, 17), (3, 0, 17), (2, 3, 4, 17)], ids=str)
def test_shapes(op: Op, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(17, requires_grad=True)
    args = arguments(op, x, torch.randn(shape, requires_grad=True), weight)
    for name, result in results_and_grads(op.fused, args).items():
        expected = results_and_grads(op.reference, args)[name]
        assert result.shape == expected.shape and result.dtype == expected.dtype
        torch.testing.assert_close(result, expected)


@norms
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weight_gradient_has_the_weight_dtype(op: Op, weight_dtype: torch.dtype) -> None:
    x = torch.randn(4, 40, dtype=torch.bfloat16)
    weight = torch.ones(40, dtype=weight_dtype, requires_grad=True)
    y, _ = op.fused(*arguments(op, x, None, weight))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad is not None and weight.grad.dtype == weight_dtype


@norms
def test_only_the_sum_is_differentiated(op: Op) -> None:
    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((4, 8), (4, 8), (8,)))
    _, h = op.fused(*arguments(op, x, residual, weight))
    h.sum().backward()
    assert weight.grad is None
    assert torch.equal(x.grad, torch.ones(4, 8)) and torch.equal(residual.grad, x.grad)


@norms
def test_gradients_of_x_and_residual_are_separate_tensors(op: Op) -> None:
    x, residual = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    y, h = op.fused(*arguments(op, x, residual, None))
    (y * torch.randn(4, 8) + h).sum().backward()
    before = residual.grad.clone()
    x.grad.zero_()  # as optimizers and clipping do in place
    assert torch.equal(residual.grad, before)


@norms
def test_expanded_and_transposed_gradients(op: Op) -> None:
    x, residual = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    args = arguments(op, x, residual, torch.randn(8))
    for dy, dh in ((torch.ones(()).expand(6, 8), torch.randn(8, 6).t()), (torch.randn(8).expand(6, 8), None)):
        y, h = op.fused(*args)
        y_eager, h_eager = op.reference(*args)
        outputs, eager = ([y], [y_eager]) if dh is None else ([y, h], [y_eager, h_eager])
        grads = [dy] if dh is None else [dy, dh]
        ours, theirs = (torch.autograd.grad(o, (x, residual), grads) for o in (outputs, eager))
        torch.testing.assert_close(ours, theirs)


@norms
@dtypes
def test_transposed_input(op: Op, dtype: torch.dtype) -> None:
    x = torch.randint(-64, 64, (24, 7)).div(16).to(dtype).t().requires_grad_()
    assert_parity(op, arguments(op, x, None, torch.randn(24).to(dtype).requires_grad_()))


@norms
def test_reference_matches_finite_differences(op: Op) -> None:
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(op.reference, arguments(op, x, residual, weight))


@norms
def test_deterministic(op: Op) -> None:
    sample = next(s for s in op.samples("cpu", torch.bfloat16))
    assert deterministic(op.fused, sample.args)


@norms
def test_double_backward_is_refused(op: Op) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    y, _ = op.fused(*arguments(op, x, None, None))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


BAD = {
    "scalar": (torch.tensor(1.0), None, None, "no last dimension"),
    "no columns": (torch.ones(4, 0), None, None, "no last dimension"),
    "float64": (torch.ones(4, 8).double(), None, None, "dtype float64 is none of"),
    "integers": (torch.ones(4, 8).long(), None, None, "dtype int64 is none of"),
    "residual broadcasts": (torch.ones(4, 8), torch.ones(8), None, r"residual \(8,\) and x \(4, 8\) differ"),
    "residual dtype": (torch.ones(4, 8), torch.ones(4, 8).half(), None, "cast one to the other's dtype"),
    "weight shape": (torch.ones(4, 8), None, torch.ones(4), "not one number for each of the 8 columns"),
    "weight dtype": (torch.ones(4, 8), None, torch.ones(8).half(), "weight is torch.float16 where x is"),
    "device": (torch.ones(4, 8), None, torch.ones(8, device="meta"), "different devices: cpu and meta"),
}


@norms
@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_the_reason(op: Op, case: tuple[Any, ...]) -> None:
    *tensors, sentence = case
    args = arguments(op, *tensors)
    with pytest.raises(ValueError, match=sentence):
        op.fused(*args)
    assert op.supports(*args)


def bytes_moved(launches: list[Launch]) -> int:
    """Bytes that the kernels read and write: rows once, a parameter once in every program that keeps it."""
    total = 0
    for start in launches:
        copies = 1 if "BLOCK_P" in start.meta else start.grid[0]  # the sum of partials reads each once
        for t in (a for a in start.args if isinstance(a, Tensor)):
            parameter = t.dim() == 1 and t.shape[0] == COLUMNS
            total += t.nbytes * (copies if parameter else 1)
    return total


ROWS, COLUMNS = 8192, 4096


@norms
@pytest.mark.parametrize("residual", [False, True])
def test_bytes_moved_are_near_the_minimum(op: Op, residual: bool) -> None:
    """On an H100; the minimum reads every input and writes every result once."""
    with FakeTensorMode():
        x, r = (torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weight = torch.empty(COLUMNS, dtype=torch.bfloat16, requires_grad=True)
        args = arguments(op, x, r if residual else None, weight)
        parameters = [a.requires_grad_() for a in args[2:] if isinstance(a, Tensor)]
        with record() as forward:
            outputs = [t for t in op.fused(*args) if t.requires_grad]
        with record() as backward:
            torch.autograd.grad(outputs, [x, *parameters], [torch.empty_like(t) for t in outputs])
    rows, columns = x.nbytes, weight.nbytes
    least_forward = (4 if residual else 2) * rows + len(parameters) * columns
    least_backward = (4 if residual else 3) * rows + (1 + len(parameters)) * columns
    assert len(forward) == 1 and len(backward) == 2
    assert bytes_moved(forward) <= 1.05 * least_forward
    assert bytes_moved(backward) <= 1.05 * least_backward


def test_offset_is_added_to_the_weight() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    fused = NORMS["add_rms_norm"].fused
    torch.testing.assert_close(fused(x, None, weight, 1e-6, 1.0)[0], fused(x, None, weight + 1, 1e-6)[0])


def test_mean_shifted_rows_keep_their_precision() -> None:
    x = (torch.randn(64, 256) * 3 + 50).bfloat16().requires_grad_()
    assert_parity(NORMS["add_layer_norm"], (x, None, torch.ones(256, requires_grad=True), None, 1e-5))


def test_samples_have_exact_sums() -> None:
    for op in NORMS.values():
        for sample in op.samples("cpu", torch.bfloat16):
            assert isinstance(sample, Sample)
            x, residual = sample.args[:2]
            if residual is not None:
                assert torch.equal((x + residual).double(), x.double() + residual.double())
