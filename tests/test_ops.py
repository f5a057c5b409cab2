"""Every op of the registry on the CPU, and the registry itself."""

from __future__ import annotations

import importlib
import sys

import op_checks as checks
import torch
from op_checks import every_dtype, every_op, small_samples, tensors
from torch.utils.checkpoint import checkpoint

from fusekit.kernels import OPS
from fusekit.kernels.op import DTYPES, Op
from fusekit.kernels.parity import deterministic, results_and_grads, widen


@every_dtype
@every_op
def test_parity(op: Op, dtype: torch.dtype, device: str) -> None:
    checks.assert_parity(op, device, dtype)


@every_dtype
@every_op
def test_fake_tells_the_truth(op: Op, dtype: torch.dtype, device: str) -> None:
    checks.assert_fake_tells_the_truth(op, device, dtype)


@every_dtype
@every_op
def test_runs_are_bitwise_equal(op: Op, dtype: torch.dtype, device: str) -> None:
    for sample in small_samples(op, device, dtype):
        assert deterministic(op.fused, sample.args), sample.name


@every_op
def test_opcheck(op: Op, device: str) -> None:
    for sample in small_samples(op, device, torch.float32):
        torch.library.opcheck(op.fused, sample.args)


@every_op
def test_gradients_may_be_expanded(op: Op, device: str) -> None:
    checks.assert_gradients_may_be_expanded(op, device, torch.bfloat16)


@every_op
def test_refuses_what_it_does_not_support(op: Op, device: str) -> None:
    checks.assert_refuses_what_it_does_not_support(op, device)


@every_op
def test_double_backward_is_refused(op: Op, device: str) -> None:
    checks.assert_double_backward_is_refused(op, device)


@every_op
def test_honours_autocast(op: Op, device: str) -> None:
    checks.assert_honours_autocast(op, device, torch.bfloat16)


@every_op
def test_inside_torch_compile(op: Op, device: str) -> None:
    for sample in list(small_samples(op, device, torch.float32))[:2]:
        torch._dynamo.reset()
        compiled = torch.compile(lambda *args, op=op: op.fused(*args), backend="aot_eager", fullgraph=True)
        checks.assert_same(results_and_grads(compiled, sample.args), results_and_grads(op.fused, sample.args))


@every_op
def test_inside_an_activation_checkpoint(op: Op, device: str) -> None:
    args = checks.smallest_sample(op, device, torch.bfloat16).args
    results = results_and_grads(lambda *a: checkpoint(op.fused, *a, use_reentrant=False), args)
    checks.assert_same(results, results_and_grads(op.fused, args))


@every_op
def test_only_asked_for_gradients_are_computed(op: Op, device: str) -> None:
    """Freezing an argument leaves the other gradients as they were."""
    args = checks.smallest_sample(op, device).args
    every = results_and_grads(op.fused, args)
    asked = [i for i in range(len(args)) if f"grad_{i}" in every]
    for alone in asked:
        frozen = tuple(a.detach() if i in asked and i != alone else a for i, a in enumerate(args))
        results = results_and_grads(op.fused, frozen)
        assert torch.equal(results[f"grad_{alone}"], every[f"grad_{alone}"]), alone


# The registry: each op keeps the promises that the loops above rely on


def test_registry_is_alphabetical_and_named_after_its_ops() -> None:
    assert list(OPS) == sorted(OPS)
    for name, op in OPS.items():
        assert str(op.fused) == f"fusekit.{name}.default"


@every_op
def test_op_explains_itself(op: Op) -> None:
    doc = sys.modules[op.reference.__module__].__doc__ or ""
    assert len(doc.splitlines()) >= 4, "the head of the file gives the formula, the paper and what is saved"
    assert "aved for backward" in doc


@every_dtype
@every_op
def test_samples_cover_what_breaks_kernels(op: Op, dtype: torch.dtype, device: str) -> None:
    samples = list(small_samples(op, device, dtype))
    assert len(samples) >= 5 and len({s.name for s in samples}) == len(samples)
    assert all(s.args[0].dtype == dtype and op.supports(*s.args) is None for s in samples)
    assert any(not t.numel() for s in samples for t in tensors(s.args)), "no empty batch"
    assert any(not t.is_contiguous() for s in samples for t in tensors(s.args)), "no strided input"
    assert any(t.shape[-1] % 8 for s in samples for t in tensors(s.args)), "no odd size"
    assert all(any(t.requires_grad for t in tensors(s.args)) for s in samples)
    assert len({len([a for a in s.args if a is None]) for s in samples}) > 1, "optional arguments never vary"
    assert max(t.numel() for s in samples for t in tensors(s.args)) < 2**20, "a sample for tests is small"


@every_op
def test_bench_samples_come_last_and_have_flops(op: Op) -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        kinds = [s.bench for dtype in DTYPES for s in op.samples("cpu", dtype)]
        flops = [op.flops(*s.args) for s in op.samples("cpu", torch.bfloat16) if s.bench]
    third = len(kinds) // len(DTYPES)
    assert kinds[:third] == sorted(kinds[:third]) and any(kinds)
    assert all(isinstance(n, int) and n > 0 for n in flops)


@every_op
def test_reference_is_differentiable_in_float64(op: Op, device: str) -> None:
    """gradcheck's fast mode: the Jacobian along random directions, against differences."""
    for sample in small_samples(op, device, torch.float32):
        if all(t.numel() for t in tensors(sample.args)):
            assert torch.autograd.gradcheck(op.reference, widen(sample.args), fast_mode=True), sample.name


@every_op
def test_reference_keeps_float64(op: Op, device: str) -> None:
    """A stray .float() would make the truth as wrong as what it judges."""
    sample = checks.smallest_sample(op, device)
    exact = results_and_grads(op.reference, widen(sample.args))
    assert all(t.dtype == torch.float64 for t in exact.values())
    rounded = results_and_grads(op.reference, sample.args)
    for name, t in exact.items():
        if t.numel():
            assert not torch.equal(t, t.float().double()), f"{name} has float32's digits only"
            assert rounded[name].dtype == torch.float32


@every_op
def test_op_has_a_rule(op: Op) -> None:
    rules = importlib.import_module("fusekit.passes.rules").RULES
    assert any(OPS[rule.op] is op for rule in rules)
