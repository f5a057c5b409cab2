"""Who computes an FP8 product on a GPU: what torch._scaled_mm may take, its trial, what was measured."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fp8_choice_checks import BF16, CPU, E4M3, E5M2, KINDS, call, fails, fresh, h100  # noqa: F401 (fresh is a fixture)
from rich.console import Console
from torch import Tensor

import fusekit
from benchmarks import tune_fp8
from fusekit.kernels import fp8_choice, fp8_gemm, fp8_library, fp8_trial, linear_fp8, times_file
from fusekit.kernels.fp8_choice import choose, products
from fusekit.kernels.fp8_format import Operand
from fusekit.kernels.fp8_library import LIBRARY, Call, unfit
from fusekit.kernels.launch import record
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.kernels.times_file import OWN


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"capability": (8, 0)}, "no FP8 tensor cores"),
        ({"capability": (10, 0), "scaling": "block"}, "block scales on another GPU than Hopper"),
        ({"capability": (8, 9), "scaling": "block"}, "block scales on another GPU than Hopper"),
        (
            {"scaling": "block", "sizes": (2040, 1024, 4096)},
            "block scales of rows that 16 does not divide",
        ),
        (
            {"scaling": "block", "square": True, "sizes": (2048, 1040, 4096)},
            "block scales of columns that 128 does not divide",
        ),
        ({"scaling": "block", "accumulation": "fp32"}, "fp32 sums"),
        ({"scaling": "block", "epilogue": True}, "an activation"),
        ({"scaling": "mx"}, "mx scales"),
        ({"capability": (8, 9), "scaling": "row"}, "row scales before Hopper"),
        ({"accumulation": "fp32"}, "fp32 sums"),
        ({"accumulation": "exact"}, "exact sums"),
        ({"epilogue": True}, "an activation"),
        ({"bias": torch.float32}, "a float32 bias"),
        ({"bias": torch.float32, "dtypes": (E4M3, E4M3, torch.float32)}, "a float32 bias"),
        ({"dtypes": (E4M3, E5M2, BF16)}, "e5m2 on the right"),
        ({"sizes": (64, 24, 128)}, "columns that 16 does not divide"),
        ({"contiguous": False}, "strides"),
        ({"sizes": (0, 32, 128)}, "strides"),
    ],
)
def test_the_own_kernel_keeps_what_the_library_does_not_compute(changes, reason):
    assert choose(call(**changes)) == (OWN, reason)


def test_what_the_library_may_take():
    for changes in (*KINDS.values(), {"capability": (8, 9)}, {"capability": (10, 0)}):
        assert unfit(call(**changes)) is None


def layer(bias: torch.dtype | None = None, act: str = "none", recipe: str = "fp8-tensorwise", tokens=1024):
    x, weight = torch.empty(2, tokens // 2, 2048, dtype=BF16), torch.empty(4096, 2048)
    return x, weight, None if bias is None else torch.empty(4096, dtype=bias), act, recipe


def test_the_products_of_a_layer():
    found = products(*layer())
    assert {name: (c.sizes, c.dtypes) for name, c in found.items()} == {
        "output": ((1024, 4096, 2048), (E4M3, E4M3, BF16)),
        "grad_input": ((1024, 2048, 4096), (E5M2, E4M3, BF16)),
        "grad_weight": ((4096, 2048, 1024), (E5M2, E4M3, torch.float32)),
    }
    fast = products(*layer(recipe=dataclasses.replace(Recipe(), accumulation="fast").token()))
    assert [c.accumulation for c in fast.values()] == ["fast", "promote128", "promote128"]
    blocks = products(*layer(recipe=dataclasses.replace(PRESETS["fp8-block"], accumulation="fast").token()))
    assert [(c.accumulation, c.square) for c in blocks.values()] == [
        ("promote128", True), ("promote128", True), ("promote128", False),
    ]  # fmt: skip
    assert list(products(*layer(recipe="fp8-rowwise-bf16-wgrad"))) == ["output", "grad_input"]


def test_what_a_report_says_of_a_layer():
    assert fp8_choice.describe(*layer()) == "_scaled_mm: static default on sm_90"
    assert fp8_choice.describe(*layer(act="gelu")) == (
        "output by own kernel: an activation; grad_input, grad_weight by _scaled_mm: static default on sm_90"
    )
    assert fp8_choice.describe(*layer(recipe="fp8-block")) == (
        "output, grad_input by _scaled_mm: static default on sm_90; grad_weight by own kernel: not measured "
        "against _scaled_mm: fusekit bench --tune does"
    )
    assert fp8_choice.describe(*layer(recipe="mxfp8")) == "own kernel: mx scales"
    assert linear_fp8.runs_on(*layer()) == "emulated"  # tensors of a CPU are never a library's


def test_defaults_by_architecture_and_size():
    assert choose(call()) == (LIBRARY, "static default on sm_90")
    assert choose(call(capability=(10, 0))) == (LIBRARY, "static default on sm_100")
    assert choose(call(sizes=(2048, 512, 4096))) == (OWN, "a dimension below 1024, and not measured")
    ada = choose(call(capability=(8, 9)))
    assert ada.name == OWN and "not measured against _scaled_mm" in ada.reason


def test_a_library_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(fp8_library, "absent", lambda: "this PyTorch has no CUDA")
    assert choose(call()) == (OWN, "_scaled_mm: this PyTorch has no CUDA")


def gaussian(call: Call) -> tuple[Operand, Operand, Tensor | None]:
    return fp8_trial._operands(call, False)


@pytest.fixture
def on_cpu(monkeypatch):
    """Operands without our cast, which needs a GPU."""
    monkeypatch.setattr(fp8_choice, "operands", gaussian)


def clock(own: float, library: float, products: int = 3) -> Callable[[Any], float]:
    times = iter((own, library) * products)
    return lambda run: run() or next(times)


SMALL = torch.empty(2, 16, 48, dtype=BF16), torch.empty(32, 48), None, "none", "fp8-tensorwise"


def test_the_faster_of_two_that_were_measured_runs(on_cpu):
    """Kept on disk by bucket: a neighbouring size and another process profit."""
    found = fp8_choice.measure(*SMALL, clock=clock(3e-4, 2e-4))
    assert list(found) == ["output", "grad_input", "grad_weight"]
    assert all(times == {OWN: 3e-4, LIBRARY: 2e-4} for times in found.values())
    output = products(*SMALL)["output"]
    assert choose(output) == (LIBRARY, "measured 200 µs, own kernel 300")
    times_file.forget()
    fp8_choice._plans.held.clear()
    assert choose(output._replace(sizes=(30, 32, 64))).name == LIBRARY
    assert choose(output._replace(sizes=(33, 32, 64))).name == OWN
    (file,) = times_file.cache_folder().glob("fp8-*.json")
    assert file.name == "fp8-test.json"
    fp8_choice.measure(*SMALL, clock=clock(1e-4, 2e-4))
    assert choose(output) == (OWN, "measured 100 µs, _scaled_mm 200")


def test_a_result_that_differs_at_a_size_is_never_the_librarys_again(on_cpu, monkeypatch):
    """Another algorithm of the library may run at another size than the trial's."""
    sizes = torch.empty(1, 1024, 2048, dtype=BF16), torch.empty(1024, 2048), None, "none", "fp8-tensorwise"
    (asked,) = (c for name, c in products(*sizes).items() if name == "output")
    assert choose(asked).name == LIBRARY and fp8_choice._proved(asked)
    monkeypatch.setattr(fp8_choice, "operands", lambda c: gaussian(c._replace(sizes=(16, 16, 2048))))
    monkeypatch.setattr(fp8_choice, "products", lambda *args: {"output": asked})
    monkeypatch.setattr(fp8_library, "run", lambda a, b, output, *rest: h100(a, b, output, *rest) or
                        output[0].mul_(1.5))  # fmt: skip
    monkeypatch.setattr(torch, "empty", lambda size, **rest: torch.zeros((16, 16), **rest))
    fp8_choice.measure(*sizes, clock=lambda run: 1e-4)
    assert choose(asked) == (OWN, "measured 100 µs, _scaled_mm differs")


def test_nothing_is_measured_where_there_is_no_choice(monkeypatch):
    def clock(run: Callable[[], object]) -> float:
        raise AssertionError("nobody asked")

    assert fp8_choice.measure(*layer(recipe="mxfp8"), clock=clock) == {}
    monkeypatch.setattr(fp8_library, "run", fails)
    assert fp8_choice.measure(*layer(), clock=clock) == {}


@pytest.mark.parametrize("act, ran", [("none", LIBRARY), ("gelu", OWN)])
def test_a_product_is_computed_by_whom_the_choice_names(monkeypatch, act, ran):
    who = []
    monkeypatch.setattr(fp8_library, "run", lambda *args: who.append(LIBRARY) or h100(*args))
    monkeypatch.setattr(fp8_gemm, "product", lambda *args, **settings: who.append(OWN))
    monkeypatch.setattr(fp8_choice, "LEAST_SIZE", 16)
    a, b, _ = gaussian(call(sizes=(16, 16, 128)))
    output = torch.empty(16, 16, dtype=BF16)
    fp8_choice.product(a, b, output, Recipe(), (E4M3, E4M3), contraction=128, act=act)
    assert who[-1] == ran


def test_no_trial_while_a_cuda_graph_is_captured(monkeypatch):
    monkeypatch.setattr(fp8_choice.trial, "is_capturing", lambda: True)
    assert not fp8_choice._proved(call()) and not fp8_trial._outcomes


def test_recorded_launches_are_our_own():
    """What is compiled ahead of time is what ships, whatever library there is."""
    with torch._subclasses.fake_tensor.FakeTensorMode(), record() as launches:
        x, weight = torch.empty(2048, 1024, dtype=BF16), torch.empty(1024, 1024, dtype=BF16)
        torch.ops.fusekit.linear_fp8(x, weight)
    assert launches[-1].kernel is fp8_gemm.product_kernel


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_the_call_is_one_that_torch_takes(scaling, monkeypatch):
    """Layouts, scales and dtypes: by torch's own checks for a GPU, without one."""
    monkeypatch.undo()
    asked = call(sizes=(40, 32, 128), scaling=scaling)
    operands = gaussian(asked)[:2]
    # The variant that writes into `out` has no checks of its own without a GPU.
    checked = SimpleNamespace(out=lambda *args, out: torch.ops.aten._scaled_mm.default(*args))
    monkeypatch.setattr(fp8_library, "aten", SimpleNamespace(_scaled_mm=checked))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = [Operand(*(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in o)) for o in operands]
        output = torch.empty(40, 32, dtype=BF16, device="cuda")
        fp8_library.run(*fake, output, asked)
        narrow = Operand(torch.empty(32, 100, dtype=torch.uint8, device="cuda"), fake[1].inverse)
        with pytest.raises(RuntimeError):
            fp8_library.run(fake[0], narrow, output, asked)


@pytest.mark.skipif(
    not hasattr(torch._meta_registrations, "_check_scaled_mm_sizes_v2"), reason="this PyTorch checks on a GPU"
)
@pytest.mark.parametrize("square", [True, False])
def test_the_call_of_blocks_is_one_that_torch_takes(square: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 steps of the contraction, which 4 does not divide, and scales that lie as it is told."""
    monkeypatch.undo()
    asked = call(sizes=(48, 256, 640), scaling="block", square=square)
    a, b, _ = gaussian(asked)
    handed = []

    def checked(*args: Any, out: Tensor) -> Tensor:
        handed.append(args)
        left, right, a_scales, a_type, a_swizzle, b_scales, b_type, b_swizzle, bias, dtype = args
        return torch._meta_registrations._check_scaled_mm_sizes_v2(
            left, right, a_scales, a_type, b_scales, b_type, bias, dtype, a_swizzle, b_swizzle
        )

    monkeypatch.setattr(fp8_library, "aten", SimpleNamespace(_scaled_mm_v2=SimpleNamespace(out=checked)))
    output = torch.empty(48, 256, dtype=BF16)
    with pytest.raises(RuntimeError):
        fp8_library.run(a, Operand(b.codes, b.inverse[:4]), output, asked)
    fp8_library.run(a, b, output, asked)
    _, _, (left,), left_type, _, (right,), right_type, *_ = handed[-1]
    assert left_type == [4] and torch.equal(left, a.inverse.t()) and left.stride() == (1, 48)
    assert left.data_ptr() == a.inverse.data_ptr()
    if square:
        assert right_type == [5] and right.shape == (8, 2) and right.stride() == (1, 8)
        assert torch.equal(right[:5], b.inverse)
    else:
        assert right_type == [4] and right.data_ptr() == b.inverse.data_ptr()
        assert right.shape == (256, 5) and right.stride() == (1, 256)


def test_what_the_library_refuses_at_a_size_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kind whose trial it passed: training goes on, and the report says why."""

    def refuses_wide(a: Operand, b: Operand, output: Tensor, *rest: Any) -> None:
        if output.shape[1] == 128:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")
        h100(a, b, output, *rest)

    monkeypatch.setattr(fp8_library, "run", refuses_wide)
    who: list[str] = []
    monkeypatch.setattr(fp8_gemm, "product", lambda *args, **settings: who.append(OWN))
    monkeypatch.setattr(fp8_choice, "LEAST_SIZE", 16)
    asked = call(sizes=(16, 128, 128), scaling="block", square=True)
    a, b, _ = gaussian(asked)
    recipe = Recipe(scaling="block", gradient=E4M3)
    for _ in range(2):
        output = torch.empty(16, 128, dtype=BF16)
        fp8_choice.product(a, b, output, recipe, (E4M3, E4M3), contraction=128, square=True)
    assert who == [OWN, OWN]
    assert choose(asked).reason == (
        "_scaled_mm: at this size it fails: RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"
    )


def test_the_call_computes_what_ours_does(monkeypatch):
    """On a CPU, which has scales of tensors."""
    monkeypatch.undo()
    asked = call(sizes=(40, 32, 128))
    a, b, _ = gaussian(asked)
    output, expected = torch.empty(40, 32, dtype=BF16), torch.empty(40, 32, dtype=BF16)
    fp8_library.run(a, b, output, asked)
    h100(a, b, expected, asked)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))


def test_verify_measures_once_and_training_never(monkeypatch):
    measured = []
    monkeypatch.setattr(fp8_choice, "measure", lambda *args: measured.append(args) or {})
    monkeypatch.setattr(linear_fp8, "on_gpu", lambda x: measured is not None and _verifying[0])
    _verifying = [False]
    torch.manual_seed(0)
    model = fusekit.optimize(
        torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16)),
        precision="fp8",
    )
    x = torch.randn(40, 32)
    model(x).sum().backward()
    assert not measured
    from fusekit import site_check

    def once(*args: Any) -> Any:
        _verifying[0] = True
        try:
            return linear_fp8.measure(*args)
        finally:
            _verifying[0] = False

    monkeypatch.setitem(site_check.MEASURE, "linear_fp8", once)
    assert fusekit.verify(model, x).ok
    assert [args[0].shape for args in measured] == [(40, 32)]


def test_tuning_measures_what_training_meets(on_cpu):
    """`fusekit bench --tune` on tiny layers: each preset that leaves a choice."""
    out = io.StringIO()
    found = tune_fp8.run(
        CPU, Console(file=out, width=200), layers=((32, 32, 48),), clock=clock(2e-4, 1e-4, 7)
    )
    assert set(found) == {f"{name} 32x32x48" for name in ("fp8-tensorwise", "fp8-rowwise", "fp8-block")}
    assert list(found["fp8-block 32x32x48"]) == ["grad_weight"]  # the others' columns are too few
    assert "output: _scaled_mm 100 µs, own kernel 200 µs" in out.getvalue()
