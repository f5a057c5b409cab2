"""The static lane's gate fails bad kernels and passes good ones; what it compiles is what is launched."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks.static import lane as static
from benchmarks.static import specialisations
from fusekit.kernels._triton import HAS_TRITON
from fusekit.kernels.launch import Launch

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

FIGURES = {
    "key": "k",
    "arch": 90,
    "registers": 120,
    "spills": 0,
    "advisories": [],
    "tensor_cores": True,
    "shared": 98304,
}

KERNELS = """
    import triton
    import triton.language as tl

    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :])
            b = tl.load(b_ptr + (start + k)[:, None] * BLOCK_N + n[None, :])
            accumulator = tl.dot(a, b, accumulator)
        tl.store(c_ptr + m[:, None] * BLOCK_N + n[None, :], accumulator.to(c_ptr.dtype.element_ty))

    @triton.jit
    def broken(a_ptr, BLOCK: tl.constexpr):
        tl.store(a_ptr + tl.arange(0, BLOCK), tl.arange(0, BLOCK + 1))
"""


@pytest.fixture
def compile_kernel(tmp_path, monkeypatch):
    """Compile a kernel of KERNELS in a worker process, as the lane does."""
    (tmp_path / "lane_kernels.py").write_text(textwrap.dedent(KERNELS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(kernel: str, arch: int, dtype: str = "*bf16", warps: int = 4, **constexprs: int) -> dict:
        names = ["a_ptr", "b_ptr", "c_ptr", "K"] if kernel == "product" else ["a_ptr"]
        signature = dict.fromkeys(names, dtype) | ({"K": "i32"} if kernel == "product" else {})
        job = {
            "key": kernel,
            "arch": arch,
            "module": "lane_kernels",
            "kernel": kernel,
            "signature": signature | dict.fromkeys(constexprs, "constexpr"),
            "constexprs": constexprs,
            "divisible": names,
            "options": {"num_warps": warps, "num_stages": 2},
        }
        worker = [sys.executable, str(static.WORKER)]
        output = subprocess.run(
            worker, input=json.dumps(job), capture_output=True, text=True, check=True
        ).stdout
        return json.loads(output)

    return run


@pytest.mark.parametrize("arch", static.ARCHITECTURES)
def test_a_good_product_passes(compile_kernel, arch):
    figures = compile_kernel("product", arch, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
    assert static.gate(figures, warps=4) == [] and figures["tensor_cores"] and figures["registers"] > 16


def test_a_kernel_that_spills_fails(compile_kernel):
    figures = compile_kernel("product", 90, BLOCK_M=256, BLOCK_N=256, BLOCK_K=32)
    assert any("spills" in sentence for sentence in static.gate(figures, warps=4))


def test_a_kernel_that_does_not_compile_fails(compile_kernel):
    (sentence,) = static.gate(compile_kernel("broken", 90, BLOCK=64), warps=4)
    assert "does not compile" in sentence


def test_a_product_off_the_tensor_cores_is_noticed():
    worker = importlib.import_module("benchmarks.static.worker")
    ttir = "%7 = tt.dot %5, %6, %acc : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>"
    log = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 40 registers"
    code = {"ttir": ttir, "ptx": "fma.rn.f32"}
    assert not worker.read_code(code, log, 90)["tensor_cores"]
    assert not worker.read_code({"ttir": ttir, "ptx": "mma.sync"}, log, 90)["tensor_cores"]
    assert worker.read_code({"ttir": ttir, "ptx": "wgmma.mma_async"}, log, 90)["tensor_cores"]
    float32 = ttir.replace("bf16", "f32")
    assert worker.read_code({"ttir": float32, "ptx": "fma.rn.f32"}, log, 90)["tensor_cores"]
    tf32 = float32.replace(" :", ", inputPrecision = tf32 :")
    assert not worker.read_code({"ttir": tf32, "ptx": "fma.rn.f32"}, log, 90)["tensor_cores"]


def test_serialised_wgmma_is_noticed():
    worker = importlib.import_module("benchmarks.static.worker")
    log = "(C7512) Potential Performance Loss: wgmma.mma_async ...\nUsed 40 registers, 12 bytes spill stores"
    figures = worker.read_code({"ttir": "", "ptx": ""}, log, 90)
    assert figures["advisories"] == ["C7512"] and figures["spills"] == 12


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"advisories": ["C7515"]}, "C7515"),
        ({"tensor_cores": False}, "tensor cores"),
        ({"shared": 232_449}, "shared memory"),
        ({"arch": 80, "shared": 166_913}, "shared memory"),
        ({"registers": 255}, "cannot be launched"),
        ({"registers": 129}, "120 are recorded"),
        ({"error": "CompilationError"}, "does not compile"),
    ],
)
def test_gate_names_what_is_wrong(change, sentence):
    warps = 16 if change.get("registers") == 255 else 8
    assert static.gate(FIGURES, warps, FIGURES) == []
    assert any(sentence in found for found in static.gate(FIGURES | change, warps, FIGURES))


def test_regressions_are_judged_against_the_record():
    found = {"k": specialisations.Specialisation("m", "k", {}, {}, [], {"num_warps": 4})}
    results = {"3.8": {("k", 90): FIGURES}}
    assert static.judge(found, results, static.to_record(results)) == []
    better = {"k": {"triton 3.8 sm_90": {"registers": 64, "shared": 0}}}
    assert static.judge(found, results, better)[0][:3] == ("k", "3.8", 90)


def test_specialisation_follows_tritons_launcher():
    norm = importlib.import_module("fusekit.kernels.add_rms_norm")
    kernel = norm._forward_kernel
    names = [p.name for p in kernel.params if not p.is_constexpr]
    x = torch.empty(4, 48)
    values = [x if name.endswith("_ptr") else 48 if name == "N" else 3 for name in names]
    values[names.index("residual_ptr")] = None
    values[names.index("x_stride")] = 1
    values[names.index("eps")] = 1e-5
    blocks = {p.name: 64 for p in kernel.params if p.is_constexpr}
    found = specialisations.specialise(Launch(kernel, (1,), tuple(values), {**blocks, "num_warps": 8}))
    assert found.signature["x_ptr"] == "*fp32" and found.signature["eps"] == "fp32"
    assert found.constexprs["residual_ptr"] is None and found.constexprs["x_stride"] == 1
    assert "N" in found.divisible and "M" not in found.divisible and found.options == {"num_warps": 8}


def test_unaligned_views_are_not_called_aligned():
    assert specialisations._aligned(torch.empty(64)) and not specialisations._aligned(torch.empty(64)[1:])
    assert specialisations._aligned(torch.empty(64, dtype=torch.bfloat16)[8:])


def test_every_op_is_compiled_in_every_dtype():
    found = specialisations.collect()
    pointers = {kernel: set() for kernel in {s.module for s in found.values()}}
    for s in found.values():
        pointers[s.module] |= set(s.signature.values())
    assert len(pointers) >= 3
    for module in ("add_layer_norm", "add_rms_norm", "attention_kernels", "gemm_kernels"):
        assert {"*fp32", "*fp16", "*bf16"} <= pointers[f"fusekit.kernels.{module}"]
    assert any(s.bench for s in found.values()) and not all(s.bench for s in found.values())
    json.dumps([s.constexprs for s in found.values()])


def test_every_kernel_file_loads_without_torch():
    """What the worker does in the environment of Triton 3.6, which has no PyTorch."""
    names = [f.stem for f in Path(static.ROOT, "kernels").glob("*.py") if f.stem != "__init__"]
    program = f"""
        import importlib, sys
        sys.path.insert(0, {str(static.WORKER.parent)!r})
        import worker
        worker.prepare()
        for name in {names!r}:
            importlib.import_module("fusekit.kernels." + name)
        assert type(sys.modules["torch"]).__name__ == "_Torch"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
