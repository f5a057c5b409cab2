"""The loss by chunks, on a GPU or in the sanitizer: several, ragged, of a vocabulary that is not aligned."""

from __future__ import annotations

import pytest
import torch

from fusekit.kernels import linear_cross_entropy
from fusekit.kernels.linear_cross_entropy import OP
from fusekit.kernels.parity import check, deterministic, longest_sum, results_and_grads, widen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_chunks_of_an_odd_vocabulary(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "LEAST_ROWS", 32)
    torch.manual_seed(0)
    x = torch.randn(75, 24).to("cuda", dtype).requires_grad_()
    weight = (0.4 * torch.randn(151, 24)).to("cuda", dtype).requires_grad_()
    bias = torch.randn(151).to("cuda", dtype).requires_grad_()
    targets = torch.randint(151, (75,))
    targets[::5] = -100
    args = (x, weight, bias, targets.to("cuda"))
    truth, eager = results_and_grads(OP.reference, widen(args)), results_and_grads(OP.reference, args)
    verdicts = check(
        results_and_grads(OP.fused, args), eager, truth, dtype=dtype, terms=longest_sum(args), inherent=True
    )
    assert all(v.ok for v in verdicts), [v for v in verdicts if not v.ok]
    assert deterministic(OP.fused, args, runs=2)
