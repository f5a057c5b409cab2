"""Sampled FP8 statistics on a GPU: those of the CPU, and a model that is sampled, demoted and goes on."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import fusekit
from fusekit.kernels.precision_statistics import (
    STATISTICS,
    grad_input_statistics,
    grad_weight_statistics,
    output_statistics,
    sample,
)
from fusekit.kernels.recipe import PRESETS
from fusekit.passes import cost


@pytest.mark.parametrize("name", ["fp8-tensorwise", "fp8-rowwise", "fp8-block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_statistics_are_the_cpus(name: str, dtype: torch.dtype) -> None:
    recipe, generator = PRESETS[name], torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(shape, generator=generator) for shape in ((192, 48), (160, 48), (192, 160)))
    x = (x * torch.exp(2 * torch.randn(192, 1, generator=generator))).to(dtype)
    found = []
    for device in ("cpu", "cuda"):
        X, G = sample(x.to(device), 64, 1), sample(g.to(device, dtype), 64, 1)
        W, T = sample(w.to(device), 128, block=128), sample(w.to(device).t(), 128, block=128)
        vectors = (
            output_statistics(X, W, recipe),
            grad_input_statistics(G, T, recipe),
            grad_weight_statistics(G, X, recipe),
        )
        found.append(torch.stack(vectors).cpu())
    # A bfloat16 product may be summed in another order before it is rounded.
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-3)
    assert found[0].shape == (3, len(STATISTICS))


def test_a_model_is_sampled_and_a_layer_with_outliers_demoted(monkeypatch: pytest.MonkeyPatch) -> None:
    if "ttsem" in sys.modules:
        from ttsem._fakedriver import unstub_torch_cuda

        unstub_torch_cuda()
    monkeypatch.setattr(cost, "why_fp8_does_not_pay", lambda *sizes: None)  # so small it would not
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))
    model = model.cuda()
    config = fusekit.AutoPrecision(every=1, calibration=1, mode="observe")
    fusekit.optimize(model, precision=config, remainder="eager")
    factor = torch.exp(4 * torch.randn(64, 1)).cuda()
    for _ in range(2):
        model(torch.randn(64, 32).cuda() * factor).square().mean().backward()
        fusekit.auto_precision(model).step()
    plan = fusekit.auto_precision(model).plan
    names = {name: layer.units["output"].level for name, layer in plan.layers.items()}
    assert names == {"0": 1, "2": 0}
