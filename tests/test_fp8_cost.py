"""What FP8 is estimated to gain on an H100, and what follows for layers and their activations."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusekit
from benchmarks.fp8_layers import LAYERS
from benchmarks.results_file import RESULTS
from fusekit.kernels.recipe import PRESETS
from fusekit.passes import cost
from fusekit.passes.cost import why_fp8_does_not_pay

pytestmark = pytest.mark.usefixtures("checked")


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    (device,) = (device for device in cost.GPUS if device.name == "H100")
    monkeypatch.setattr(cost, "GPU", device)


def on_gpu(M: int, K: int) -> Tensor:
    with FakeTensorMode():
        return torch.empty(M, K, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("M", "N", "K", "name", "pays"),
    [
        (64, 256, 256, "fp8-tensorwise", False),
        (16384, 16384, 4096, "fp8-tensorwise", True),
        (16384, 16384, 4096, "fp8-delayed", True),
        (16384, 16384, 4096, "fp8-rowwise", True),
        (
            16384,
            16384,
            512,
            "fp8-rowwise",
            False,
        ),  # too little for the library
        (16384, 16384, 4096, "fp8-rowwise-bf16-wgrad", True),
        (8192, 2048, 2048, "fp8-rowwise-bf16-wgrad", False),  # a third of it gains nothing
        (16384, 16384, 4096, "fp8-block", False),  # the weight gradient by our kernel loses what others gain
        (32768, 16384, 16384, "fp8-block", True),
        (32768, 16384, 16400, "fp8-block", False),  # columns of grad_input that 128 does not divide
        (16384, 16384, 4096, "mxfp8", False),
    ],
)
def test_what_does_not_pay_on_an_h100_stays(M: int, N: int, K: int, name: str, pays: bool) -> None:
    x = on_gpu(M, K)
    reason = why_fp8_does_not_pay(M, N, K, x, PRESETS[name])
    assert reason is None if pays else reason is not None and "as estimated" in reason
    assert (
        why_fp8_does_not_pay(M, N, K, torch.empty(1), PRESETS[name]) is None
    )  # asked for on a CPU it is emulated


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "fp8-block"])  # by another kernel since
def test_estimates_are_what_an_h100_took(name: str) -> None:
    cells = json.loads((RESULTS / "fp8_layers_h100.json").read_text())["cells"]
    for M, K, N in LAYERS:
        x = on_gpu(M, K)
        estimated = cost.fp8_seconds(M, N, K, x, PRESETS[name])
        measured = [cells[f"{M}x{K}x{N} {what} forward+backward"]["seconds"] for what in ("bf16", name)]
        assert estimated == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("M", "N", "K", "name", "apart"),
    [
        (8192, 16384, 4096, "fp8-tensorwise", True),
        (8192, 16384, 4096, "fp8-delayed", True),
        (8192, 4096, 1024, "fp8-tensorwise", False),  # the pass takes longer than the library saves
        (8192, 16384, 512, "fp8-delayed", False),  # too little for the library
        (8192, 16384, 4096, "mxfp8", False),  # which it does not compute
    ],
)
def test_an_activation_is_left_where_the_library_is_that_much_faster(
    M: int, N: int, K: int, name: str, apart: bool
) -> None:
    x = on_gpu(M, K)
    assert cost.fp8_activation_pays_apart(M, N, K, x, PRESETS[name]) is apart
    assert not cost.fp8_activation_pays_apart(M, N, K, torch.empty(1), PRESETS[name])


def _new_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.parametrize(("act", "left"), [(F.gelu, True), (torch.relu, True), (_new_gelu, False)])
def test_only_an_activation_of_one_call_is_left(act, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight passes written out are not: an eager remainder would run them one by one."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.out = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.sin(self.down(act(self.up(x)))))

    monkeypatch.setattr(cost, "fp8_activation_pays_apart", lambda *_: True)
    model = fusekit.optimize(Layers(), precision="fp8")
    model(torch.randn(6, 32)).sum().backward()
    rules = sorted(f.rule for f in fusekit.explain(model).fused if f.op == "linear_fp8")
    assert (rules == ["FP8 linear", "FP8 linear"]) is left, rules
    assert len(rules) == 2
