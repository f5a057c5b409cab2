"""FP8 products by torch._scaled_mm: a stand-in for it in the sanitizer, itself where there is one."""

from __future__ import annotations

import fp8_checks as checks
import pytest
import torch
from torch import Tensor

from fusekit.kernels import fp8_choice, fp8_library, fp8_trial, linear_fp8, times_file
from fusekit.kernels.fp8_format import Operand
from fusekit.kernels.fp8_library import LIBRARY, Call
from fusekit.kernels.linear_fp8 import OP
from fusekit.kernels.parity import results_and_grads
from fusekit.kernels.recipe import PRESETS

TAKEN = ("fp8-tensorwise", "fp8-delayed", "fp8-rowwise", "fp8-rowwise-bf16-wgrad")
real = pytest.mark.skipif(fp8_library.absent() is not None, reason=f"{LIBRARY}: {fp8_library.absent()}")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(times_file, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(fp8_trial, "_outcomes", {})
    monkeypatch.setattr(fp8_choice, "_failed", {})
    monkeypatch.setattr(fp8_choice, "LEAST_SIZE", 16)
    monkeypatch.setattr(fp8_choice, "DEFAULTS", ("sm_80", "sm_90", "sm_100"))
    times_file.forget()
    fp8_choice._plans.held.clear()
    yield
    times_file.forget()
    fp8_choice._plans.held.clear()


def stand_in(a: Operand, b: Operand, output: Tensor, call: Call, bias: Tensor | None = None) -> None:
    """What the library computes, anywhere: from the layouts, dtypes and scales that it is handed."""
    left, right = (o.codes.cpu().view(d).float() for o, d in zip((a, b), call.dtypes[:2], strict=True))
    if call.scaling == "block":
        a_inverse, b_inverse = (
            o.inverse.cpu().repeat_interleave(128, 0).repeat_interleave(n // o.inverse.shape[1], 1)
            for o, n in zip((a, b), call.sizes[:2], strict=True)
        )
        sums = (left * a_inverse.t()) @ (right * b_inverse.t()).t()
    else:
        sums = left @ right.t() * a.inverse.cpu().t() * b.inverse.cpu()
    output.copy_((sums if bias is None else sums + bias.cpu()).to(output.dtype))


@pytest.mark.parametrize("name", [*TAKEN, "fp8-block"])
def test_a_layer_by_a_stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is handed over is right, bias and gradients included."""
    ran = []
    monkeypatch.setattr(fp8_library, "absent", lambda: None)
    monkeypatch.setattr(fp8_library, "run", lambda *args: ran.append(args[3]) or stand_in(*args))
    blocks = name == "fp8-block"
    trials = (16, 16, 256), (16, 256, 384)
    monkeypatch.setattr(fp8_trial, "SIZES", trials[0])
    monkeypatch.setattr(fp8_trial, "BLOCK_SIZES", trials[1])
    shape = (80, 128, 256) if blocks else (70, 144, 272)
    checks.assert_parity(checks.arguments("cuda", torch.bfloat16, name, shape=shape))
    wanted = sum(getattr(PRESETS[name], product) for product in ("output", "grad_input", "grad_weight"))
    wanted -= blocks  # the weight gradient's product was not measured
    layer = [call for call in ran if call.sizes not in trials]
    assert len(layer) == wanted and layer[0].bias == torch.bfloat16
    assert set(fp8_trial._outcomes.values()) == {None}


def test_what_it_does_not_compute_stays_with_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_library, "absent", lambda: None)

    def run(*args: object) -> None:
        raise AssertionError("asked for what it does not compute")

    monkeypatch.setattr(fp8_library, "run", run)
    for name in ("fp8-block", "mxfp8"):  # of blocks rows and columns are too few
        checks.assert_parity(checks.arguments("cuda", torch.bfloat16, name, shape=(34, 48, 64)))


@real
@pytest.mark.parametrize("accumulation", ["promote128", "fast"])
@pytest.mark.parametrize("scaling", ["tensor", "row", "block"])
def test_the_library_keeps_its_word(scaling: str, accumulation: str) -> None:
    """Where it may compute, its trial says that it does as ours; what fails there is named."""
    e4m3, e5m2, found = torch.float8_e4m3fn, torch.float8_e5m2, {}
    for dtypes in ((e4m3, e4m3), (e5m2, e4m3)):
        for output in (torch.bfloat16, torch.float16, torch.float32):
            device = torch.device("cuda", torch.cuda.current_device())
            sizes = fp8_trial.BLOCK_SIZES if scaling == "block" else fp8_trial.SIZES
            asked = Call(device, torch.cuda.get_device_capability(), sizes, (*dtypes, output), scaling,
                         "promote128" if scaling == "block" else accumulation)  # fmt: skip
            for square in (False, scaling == "block"):
                asked = asked._replace(square=square)
                if fp8_library.unfit(asked) is None and not fp8_choice._proved(asked):
                    found[dtypes, output, square] = fp8_trial.outcome(asked)
    # Scales of rows are CUTLASS's on some devices, which lacks dtypes: those it says itself. Of blocks too.
    wrong = {k: why for k, why in found.items() if scaling == "tensor" or "it fails" not in str(why)}
    assert not wrong, wrong


@real
@pytest.mark.parametrize("name", [*TAKEN, "fp8-block"])
@pytest.mark.parametrize("shape", [(130, 256, 512), (4096, 1024, 2048)], ids=str)
def test_a_layer_by_the_library(name: str, shape: tuple[int, int, int]) -> None:
    args = checks.arguments("cuda", torch.bfloat16, name, shape=shape)
    checks.assert_parity(args)
    found = [results_and_grads(OP.fused, args) for _ in range(2)]
    assert all(torch.equal(t, found[1][k]) for k, t in found[0].items())


@real
@pytest.mark.parametrize("name", ["fp8-tensorwise", "fp8-rowwise", "fp8-block"])
def test_what_was_measured_is_what_runs(name: str) -> None:
    x = torch.empty(2048, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.empty(2048, 1024, device="cuda")
    found = linear_fp8.measure(x, weight, None, "none", name)
    for product, call in fp8_choice.products(x, weight, None, "none", name).items():
        choice = fp8_choice.choose(call)
        if product in found:
            assert found[product][LIBRARY] != times_file.WRONG, product
            assert choice.name == min(found[product], key=found[product].__getitem__)
