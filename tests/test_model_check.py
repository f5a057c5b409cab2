"""The whole model against float64: models that have none, and the rounding unit that a model is held to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusekit
from fusekit.model_check import _compare, _unit


class NoFloat64(nn.Module):
    """As transformers' experts with grouped products: an op in it knows no float64."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double")
        return x + nn.functional.gelu(self.linear(self.norm(x)))


def test_a_model_without_float64_keeps_the_certificates_of_its_sites() -> None:
    model = fusekit.optimize(NoFloat64())
    certificate = fusekit.verify(model, torch.randn(4, 16))
    assert certificate.ok and certificate.sites and not certificate.model
    (note,) = certificate.notes
    assert "does not run in it" in note and "Expected mat_a" in note


@pytest.mark.parametrize("dtype, ulp", [(torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-7)], ids=str)
def test_a_loss_that_eager_rounds_by_luck_to_the_truth_is_no_limit(dtype: torch.dtype, ulp: float) -> None:
    unit = _unit(nn.Linear(2, 2).to(dtype), "keep")
    for off, ok in ((ulp, True), (4 * ulp, False)):
        values = [torch.tensor([1.0 + error], dtype=torch.float64) for error in (off, 0.0, 0.0)]
        (check,) = _compare(*((value, {}) for value in values), unit)
        assert check.ok == ok, check


def test_the_unit_is_that_of_the_coarsest_arithmetic() -> None:
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    assert _unit(nn.Linear(2, 2), "keep") == 2.0**-24
    assert _unit(nn.Linear(2, 2), "bf16") == _unit(mixed, "keep") == 2.0**-8
    assert _unit(nn.Linear(2, 2).half(), "keep") == 2.0**-11
    with torch.autocast("cpu", torch.bfloat16):
        assert _unit(nn.Linear(2, 2), "keep") == 2.0**-8
    assert _unit(nn.Identity(), "keep") == 2.0**-24
