"""Every op of the registry through its Triton kernels."""

from __future__ import annotations

import op_checks as checks
import pytest
import torch
from op_checks import every_dtype, every_op, small_samples

from fusekit.kernels.op import Op
from fusekit.kernels.parity import deterministic


@every_dtype
@every_op
def test_parity(op: Op, dtype: torch.dtype, device: str) -> None:
    checks.assert_parity(op, device, dtype)


@every_op
def test_tf32_is_as_good_as_its_operands(op: Op, device: str) -> None:
    if checks.set_argument(op, (), "tf32", True) is None:
        pytest.skip("no matmul")
    for sample in list(small_samples(op, device, torch.float32))[:3]:
        args = checks.set_argument(op, sample.args, "tf32", True)
        exact = checks.set_argument(op, sample.args, "tf32", False)
        failed = [v for v in checks.judge(op, args, torch.float32, tf32=True) if not v.ok]
        assert not failed, sample.name
        rounded, full = (checks.forward_and_backward(op.fused, a) for a in (args, exact))
        assert not torch.equal(rounded[0], full[0]), "tf32 makes no difference"


@every_dtype
@every_op
def test_fake_tells_the_truth(op: Op, dtype: torch.dtype, device: str) -> None:
    checks.assert_fake_tells_the_truth(op, device, dtype)


@every_dtype
@every_op
def test_runs_are_bitwise_equal(op: Op, dtype: torch.dtype, device: str, sanitizer: bool) -> None:
    for sample in list(small_samples(op, device, dtype))[: 1 if sanitizer else None]:
        assert deterministic(op.fused, sample.args), sample.name


@every_op
def test_gradients_may_be_expanded(op: Op, device: str) -> None:
    checks.assert_gradients_may_be_expanded(op, device, torch.bfloat16)


@every_op
def test_refuses_what_it_does_not_support(op: Op, device: str) -> None:
    checks.assert_refuses_what_it_does_not_support(op, device)


@every_op
def test_honours_autocast(op: Op, device: str, sanitizer: bool) -> None:
    if sanitizer:
        pytest.skip(
            "tensors of the sanitizer dispatch as CPU tensors, so autocast for cuda does not see them"
        )
    checks.assert_honours_autocast(op, device, torch.float16)
