"""The static lane's gate fails bad kernels and passes good ones; what it compiles is what is launched."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks.static import build, gate, record, report, roofline, sass, specialisations
from benchmarks.static.occupancy import ARCHITECTURES, occupancy
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
    "mix": {"wgmma": 4},
    "loop": {"instructions": 100, "stalls": 200, "mufu": 0, "limit": "half", "amount": 512 * 4096},
}
RECORDED = gate.derive(FIGURES, 8)

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

    def run(kernel: str, arch: int | str, dtype: str = "*bf16", warps: int = 4, **constexprs: int) -> dict:
        names = ["a_ptr", "b_ptr", "c_ptr", "K"] if kernel == "product" else ["a_ptr"]
        signature = dict.fromkeys(names, dtype) | ({"K": "i32"} if kernel == "product" else {})
        job = {
            "key": kernel,
            "arch": arch,
            "loop": arch in sass.VERIFIED,
            "module": "lane_kernels",
            "kernel": kernel,
            "signature": signature | dict.fromkeys(constexprs, "constexpr"),
            "constexprs": constexprs,
            "divisible": names,
            "options": {"num_warps": warps, "num_stages": 2},
        }
        worker = [sys.executable, str(build.WORKER)]
        output = subprocess.run(
            worker, input=json.dumps(job), capture_output=True, text=True, check=True
        ).stdout
        return json.loads(output)

    return run


@pytest.mark.parametrize("arch", build.TARGETS)
def test_a_good_product_passes(compile_kernel, arch):
    figures = compile_kernel("product", arch, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
    assert gate.gate(figures, warps=4) == [] and figures["tensor_cores"] and figures["registers"] > 16
    assert any(name in figures["mix"] for name in ("mma", "wgmma", "tcgen05"))
    if arch in sass.VERIFIED:
        assert figures["loop"]["limit"] == "half" and figures["loop"]["amount"] == 2 * 64 * 64 * 64
        assert 20 < figures["loop"]["instructions"] <= figures["loop"]["stalls"]


def test_a_kernel_that_spills_fails(compile_kernel):
    figures = compile_kernel("product", 90, BLOCK_M=256, BLOCK_N=256, BLOCK_K=32)
    assert any("spills" in sentence for sentence in gate.gate(figures, warps=4))


def test_a_kernel_that_does_not_compile_fails(compile_kernel):
    (sentence,) = gate.gate(compile_kernel("broken", 90, BLOCK=64), warps=4)
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


def test_fp8_products_need_instructions_of_fp8():
    """On wider ones, decoded, they would pass for 16-bit products."""
    worker = importlib.import_module("benchmarks.static.worker")
    ttir = "%7 = tt.dot %5, %6, %acc : tensor<64x64xf8E4M3FN> * tensor<64x64xf8E5M2> -> tensor<64x64xf32>"
    log = "0 bytes spill stores\nUsed 40 registers"
    for arch, good, bad in (
        (
            90,
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e5m2",
            "wgmma.mma_async.m64n128k16.f32.f16.f16",
        ),
        (100, "tcgen05.mma.cta_group::1.kind::f8f6f4 [", "tcgen05.mma.cta_group::1.kind::f16 ["),
    ):
        assert worker.read_code({"ttir": ttir, "ptx": good}, log, arch)["tensor_cores"]
        assert not worker.read_code({"ttir": ttir, "ptx": bad}, log, arch)["tensor_cores"]


def test_missing_promotion_is_noticed():
    """A step's 64 sums a thread are added in registers, or left in Hopper's FP8 accumulator."""
    worker = importlib.import_module("benchmarks.static.worker")
    constants = {"PROMOTE": True, "BLOCK_M": 128, "BLOCK_N": 128}
    job = {"constexprs": constants, "arch": 90, "options": {"num_warps": 8}}
    assert worker._promotes({"add": 64}, job) and worker._promotes({"fma": 64}, job)
    assert not worker._promotes({"add": 3, "wgmma fp8": 4}, job)
    assert worker._promotes({}, job | {"constexprs": constants | {"PROMOTE": False}})


def test_lost_casts_are_noticed():
    """Of registers with a value the half that is read is theirs; R52 has none, as ptxas 12.8 left it."""
    sass = importlib.import_module("benchmarks.static.sass")
    lines = [
        "LDG.E.128 R4, desc[UR8][R30.64]",
        "LOP3.LUT R6, R6, 0xffff, RZ, 0xc0, !PT",
        "LOP3.LUT R9, R9, 0xffffffef, RZ, 0xc0, !PT",
        "LOP3.LUT R52, R52, 0xffff, RZ, 0xc0, !PT",
        "STS [R30+UR4], R45",
        "LOP3.LUT R45, R45, 0xffff, RZ, 0xc0, !PT",
    ]
    listing = "\n".join(
        f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)
    )
    assert sass.lost_casts(listing) == 2
    assert sass.lost_casts(listing.replace("LDG.E.128 R4", "LDG.E.128 R50")) == 2  # R52 has a value, R6 none


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
        ({"promoted": False}, "float32 registers"),
        ({"lost_casts": 3}, "ptxas lost casts to FP8"),
        ({"shared": 232_449}, "shared memory"),
        ({"arch": 80, "shared": 166_913}, "shared memory"),
        ({"registers": 255}, "cannot be launched"),
        ({"registers": 129}, "120 are recorded"),
        ({"shared": 98305 + 128}, "98304 are recorded"),
        ({"shared": 120_000}, "warps fit on an SM, limited by shared memory"),
        ({"mix": {"wgmma": 3}}, "3 wgmma instructions, 4 are recorded"),
        ({"mix": {"mma": 9}}, "is a product off tensor cores"),
        ({"loop": FIGURES["loop"] | {"stalls": 250}}, "the hot loop takes 0.49 of its bound"),
        ({"loop": FIGURES["loop"] | {"instructions": 120}}, "240 cycles for 512"),
        ({"loop": FIGURES["loop"] | {"mufu": 32}}, "512 cycles for 512"),
        ({"error": "CompilationError"}, "does not compile"),
    ],
)
def test_gate_names_what_is_wrong(change, sentence):
    warps = 16 if change.get("registers") == 255 else 8
    assert gate.gate(FIGURES, 8, RECORDED) == []
    assert any(sentence in found for found in gate.gate(FIGURES | change, warps, RECORDED))


def test_regressions_are_judged_against_the_record(tmp_path):
    found = {"k(": specialisations.Specialisation("m", "k", {}, {}, [], {"num_warps": 8})}
    results = {"3.8": {("k(", 90): FIGURES}}
    record.write(record.to_record(found, results), tmp_path / "static.json")
    recorded = record.read(tmp_path / "static.json")
    assert gate.judge(found, results, recorded) == []
    recorded["k("]["triton 3.8 sm_90"]["registers"] = 64
    (failure,) = gate.judge(found, results, recorded)
    assert failure[:3] == ("k(", "3.8", 90)
    worse = FIGURES | {"registers": 96, "loop": FIGURES["loop"] | {"stalls": 210}}  # 5 %: tolerated
    assert gate.judge(found, {"3.8": {("k(", 90): worse}}, record.to_record(found, results)) == []


def test_a_record_keeps_what_is_planned_and_was_not_made_again():
    before = {
        "a(": {"triton 3.8 sm_90": {"made": "old"}, "triton 3.6 sm_90": {"made": "kept"}},
        "gone(": {"triton 3.8 sm_90": {"made": "old"}},
    }
    made = {"b(": {"triton 3.6 sm_90": {"made": "new"}}, "a(": {"triton 3.8 sm_90": {"made": "new"}}}
    jobs = [{"key": "a(", "arch": 90}, {"key": "b(", "arch": 90}]
    found = record.joined(made, before, {"3.8": jobs[:1], "3.6": jobs})
    assert list(found) == ["a(", "b("] and list(found["a("]) == ["triton 3.8 sm_90", "triton 3.6 sm_90"]
    assert [build["made"] for builds in found.values() for build in builds.values()] == ["new", "kept", "new"]


def test_a_record_of_another_schema_is_refused(tmp_path):
    (tmp_path / "old.json").write_text('{"gemm": {}}')
    with pytest.raises(ValueError, match="--record writes it anew"):
        record.read(tmp_path / "old.json")
    assert record.read(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        (90, 32, 0, 4, (16, 64, "warps")),
        (90, 16, 0, 1, (32, 32, "blocks")),
        (90, 168, 98_304, 4, (2, 8, "shared memory")),
        (90, 255, 1024, 8, (1, 8, "registers")),
        (80, 128, 65_536, 8, (2, 16, "registers")),
        (80, 128, 98_304, 8, (1, 8, "shared memory")),
        (90, 129, 0, 16, (0, 0, "registers")),
        (80, 32, 166_913, 4, (0, 0, "shared memory")),
    ],
)
def test_occupancy_known_answers(arch, registers, shared, warps, expected):
    """By hand from the limits; 129 registers are 136, of which a quarter of an SM holds 3 warps, not 4."""
    assert occupancy(arch, registers, shared, warps) == expected


def test_tensor_memory_limits_occupancy():
    assert occupancy(100, 32, 0, 4, tensor_columns=256) == (2, 8, "tensor memory")


def test_occupancy_agrees_with_cuxray():
    cuxray = pytest.importorskip("cuxray.occupancy")
    specs = importlib.import_module("cuxray.archspec")
    compared = itertools.product((80, 90, 100), (16, 40, 97, 128, 255), (0, 20_000, 99_000), (1, 4, 8, 16))
    for arch, registers, shared, warps in compared:
        theirs = cuxray.compute(specs.lookup(f"sm_{arch}"), registers, warps * 32, 0, shared)
        assert occupancy(arch, registers, shared, warps).blocks == theirs.blocks_per_sm


SASS = """
_kernel:
        /*0000*/               @P0 BRA `(.L_x_2) ;           /* 0x0000000000000947 */
                                                             /* 0x000fe20000000000 */
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ; /* 0x0000000000000fae */
                                                             /* 0x000fe40000000000 */
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ; /* 0x000000000000723c */
                                                             /* 0x000ff00000000000 */
        /*0030*/                   MUFU.EX2 R5, R5 ;         /* 0x0000000000007308 */
                                                             /* 0x000fe20000000000 */
        /*0040*/              @!P1 BRA `(.L_x_1) ;           /* 0x0000000000009947 */
                                                             /* 0x000fea0000000000 */
        /*0050*/                   BRA.U UP0, `(.L_x_0) ;    /* 0x0000000000009547 */
                                                             /* 0x000fea0000000000 */
.L_x_2:
        /*0060*/                   EXIT ;                    /* 0x000000000000794d */
                                                             /* 0x000fea0000000000 */
.L_x_3:
        /*0070*/                   BRA `(.L_x_3) ;           /* 0x0000000000007947 */
                                                             /* 0x000fc00000000000 */
"""


def test_the_hot_loop_is_the_inner_one_and_its_bound_is_known():
    """Stalls are bits 41-44 of the upper words: 8 (ff0), 1 (fe2) and 5 (fea)."""
    loop = sass.hot_loop(SASS, warps=8, products=True)
    assert loop == {"instructions": 3, "stalls": 14, "mufu": 1, "limit": "half", "amount": 8 * 4096}
    assert len(sass.loops(sass.blocks(SASS))) == 2  # what only an unreachable block jumps to is none
    figures = gate.derive({**FIGURES, "arch": 80, "loop": loop}, 8)
    assert figures["bound"] == 16 and figures["cycles"] == 16 and figures["ratio"] == 1.0  # mufu: 8 * 32 / 16
    copying = sass.hot_loop(SASS.replace("HMMA.16816", "MOV"), warps=8, products=False)
    assert copying["limit"] == "memory" and copying["amount"] == 16 * 32 * 8 and copying["instructions"] == 5


def test_the_schedule_agrees_with_cuxray(compile_kernel, tmp_path, monkeypatch):
    """The same sum of the same loop, by a tool that follows nvdisasm's own control flow."""
    pytest.importorskip("cuxray")
    worker = importlib.import_module("benchmarks.static.worker")
    triton = importlib.import_module("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    monkeypatch.setenv("TRITON_KERNEL_DUMP", "1")
    monkeypatch.setenv("TRITON_DUMP_DIR", str(tmp_path / "dump"))
    figures = compile_kernel("product", 90, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
    (ptx,), cubin = tmp_path.rglob("*.ptx"), tmp_path / "new.cubin"  # cuxray reads newer ELF than ptxas made
    subprocess.run([tools / "ptxas-blackwell", "-arch=sm_90a", ptx, "-o", cubin], check=True)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("CUXRAY_NO_FETCH", "1")
    command = [sys.executable, "-m", "cuxray", "sched", str(cubin), "--json"]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ours = worker.read_loop({"cubin": cubin.read_bytes(), "ttir": ""}, warps=4)
    (loop,) = theirs["results"][0]["loops"]
    assert ours["instructions"] == loop["instructions"] and figures["loop"]["amount"] == ours["amount"]
    assert ours["stalls"] == loop["est_issue_stall_cycles_per_iter"]


def test_gfx942_is_reported_and_fails_nothing(compile_kernel):
    figures = compile_kernel("product", "gfx942", BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
    assert figures["mfma"] > 0 and figures["vgpr"] > 16 and figures["products"]
    broken = compile_kernel("broken", "gfx942", BLOCK=64)
    large = figures | {"key": "large(", "lds": 65_537}
    results = {"3.8": {(f"{f['key']}(", "gfx942"): f for f in (figures, broken, large)}}
    assert gate.judge({}, results, {}) == [] and record.to_record({}, results) == {}
    assert "CompilationError" in report.obstacle(broken) and "LDS" in report.obstacle(large)
    assert report.obstacle(figures) == "" and report.amd_table(results).row_count == 3
    assert report.amd_table({"3.8": {("k(", 90): FIGURES}}) is None


def test_predictions_are_the_roofline():
    h100 = roofline.DEVICES["H100"]
    assert roofline.predict(roofline.Work(989_400_000_000, 1), h100, True) == (pytest.approx(1e-3), "compute")
    assert roofline.predict(roofline.Work(1, 3_350_000_000), h100, True) == (pytest.approx(1e-3), "memory")
    assert roofline.predict(roofline.Work(66_900_000_000, 1), h100, False) == (pytest.approx(1e-3), "compute")


def test_published_rates_agree_with_rates_a_cycle():
    """A device's peak over FLOPs a cycle is its SMs times its boost clock; so is its share of bandwidth."""
    for name, boost in (("A100", 108 * 1.41e9), ("H100", 132 * 1.83e9)):
        device = roofline.DEVICES[name]
        chip = ARCHITECTURES[device.arch]
        assert chip.flops["half"] * boost == pytest.approx(device.half, rel=0.01)
        assert chip.flops["fp32"] * boost == pytest.approx(device.fp32, rel=0.09)
        assert chip.bytes_per_cycle * boost == pytest.approx(device.bandwidth, rel=0.01)


def test_the_report_is_one_page(tmp_path, monkeypatch):
    key = "attention_kernels._forward_kernel(*bf16)"
    found = {key: specialisations.Specialisation("m", "k", {}, {}, [], {"num_warps": 8})}
    results = {"3.8": {(key, 90): FIGURES | {"key": key}, ("gemm._gemm_kernel(", "gfx942"): {"error": "no"}}}
    times = [roofline.Prediction("attention", "T=4", "bfloat16", "forward", "H100", 2e-6, "compute")]
    page = importlib.import_module("benchmarks.static.page")
    monkeypatch.setattr(page, "predictions", lambda: iter(times))
    text = page.write_report(found, results, [(key, "3.8", 90, "spills")], tmp_path).read_text()
    assert "spills" in text and "2 µs" in text and "not measured" in text and "gfx942" in text
    assert 'src="data:image/svg' in text and "http" not in re.sub(r"data:[^\"]+", "", text)
    assert {f.suffix for f in tmp_path.iterdir()} == {".html", ".png", ".svg"}


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
    modules = ("add_layer_norm", "add_rms_norm", "attention_decode", "attention_kernels", "gemm_kernels")
    for module in modules:
        assert {"*fp32", "*fp16", "*bf16"} <= pointers[f"fusekit.kernels.{module}"]
    assert any(s.bench for s in found.values()) and not all(s.bench for s in found.values())
    json.dumps([s.constexprs for s in found.values()])


def test_every_kernel_file_loads_without_torch():
    """What the worker does in the environment of Triton 3.6, which has no PyTorch."""
    names = [f.stem for f in Path(build.CHECKOUT, "kernels").glob("*.py") if f.stem != "__init__"]
    program = f"""
        import importlib, sys
        sys.path.insert(0, {str(build.WORKER.parent)!r})
        import worker
        worker.prepare()
        for name in {names!r}:
            importlib.import_module("fusekit.kernels." + name)
        assert type(sys.modules["torch"]).__name__ == "_Torch"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_only_what_changed_is_made_and_a_daily_share():
    jobs = {
        "3.6": [{"key": f"k{i}", "arch": 90, "bench": True, "targets": [], "source": "a"} for i in range(60)]
    }
    made = {job["key"]: build.fingerprint("3.6", job) for job in jobs["3.6"]}
    recorded = {key: {"triton 3.6 sm_90": {"made": value}} for key, value in made.items()}
    days = [build.changed(jobs, recorded, today)["3.6"] for today in range(build.SHARE)]
    assert sorted(job["key"] for day in days for job in day) == sorted(made)  # each on one day
    quiet = next(day for day in range(build.SHARE) if jobs["3.6"][0] not in days[day])
    jobs["3.6"][0]["source"] = "another kernel source"
    assert jobs["3.6"][0] in build.changed(jobs, recorded, quiet)["3.6"]
    del recorded["k1"]
    assert jobs["3.6"][1] in build.changed(jobs, recorded, quiet)["3.6"]
