"""Attention on the CPU: what is refused and how, and the cases that leave torch's flash kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusekit.kernels.attention import OP
from fusekit.kernels.op import DTYPES
from fusekit.kernels.parity import check, deterministic, longest_sum, results_and_grads, widen


def heads(B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, T, D) in the memory of (B, T, H, D), as a model makes it."""
    return torch.randn(B, T, H, D).to(dtype).transpose(1, 2).requires_grad_()


def assert_parity(args: tuple, dtype: torch.dtype) -> None:
    truth = results_and_grads(OP.reference, widen(args))
    eager = results_and_grads(OP.reference, args)
    fused = results_and_grads(OP.fused, args)
    verdicts = check(fused, eager, truth, dtype=dtype, terms=longest_sum(args), inherent=True)
    assert all(v.ok for v in verdicts), verdicts


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_are_within_budget(dtype):
    for sample in OP.samples("cpu", dtype):
        if not sample.bench:
            assert_parity(sample.args, dtype)


def test_samples_are_bitwise_repeatable():
    for sample in OP.samples("cpu", torch.bfloat16):
        if not sample.bench:
            assert deterministic(OP.fused, sample.args), sample.name
