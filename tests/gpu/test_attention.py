"""The attention kernels, on a GPU or in the sanitizer: every mask, shape and stride, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusekit.kernels.attention import OP
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen


def heads(B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, T, D) in the memory of (B, T, H, D), as a model makes it."""
    return torch.randn(B, T, H, D).to("cuda", dtype).transpose(1, 2).requires_grad_()


def assert_parity(args: tuple, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    truth = results_and_grads(OP.reference, widen(args))
    eager = results_and_grads(OP.reference, args)
    fused = results_and_grads(OP.fused, args)
    verdicts = check(fused, eager, truth, dtype=dtype, terms=longest_sum(args), inherent=True)
    assert all(v.ok for v in verdicts), verdicts
    return fused


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_causal_grouped_lengths_beyond_a_block(dtype):
    q, k, v = heads(1, 70, 2, 40, dtype), heads(1, 90, 1, 40, dtype), heads(1, 90, 1, 40, dtype)
    assert_parity((q, k, v, None, True), dtype)
