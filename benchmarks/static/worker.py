"""Compiles kernels ahead of time with the Triton of the Python that runs this file, and says what came out.

    python benchmarks/static/worker.py < jobs > results        one JSON object a line, both ways

A job is a Specialisation as a dict, plus "arch" (80, 90, 100 or "gfx942"), "key", and "loop", whether the
machine code is wanted too. PyTorch is not needed: kernel files are loaded with a stand-in for it, because
only their jit functions are wanted.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.static import ptx, sass  # noqa: E402

TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
FP8 = {90: "wgmma fp8", 100: "tcgen05 fp8"}  # names of ptx.mix
SERIALISED = ("C7511", "C7512", "C7515")  # ptxas: "wgmma serialized", every product waits for the one before


class _AnyType(type):
    """Answers every attribute, call and operator with itself, so that kernel files load."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Any:
        return iter(())


class _Anything(metaclass=_AnyType):
    pass


class _Torch(types.ModuleType):
    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []  # a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _TorchFinder:
    """Every submodule of torch is the stand-in as well."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "torch" or name.startswith("torch."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> Any:
        return _Torch(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def _package(name: str, folder: Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def prepare() -> None:
    """Make `fusekit.kernels.*` importable without PyTorch and without installing anything."""
    sys.meta_path.insert(0, _TorchFinder())  # type: ignore[arg-type]
    _package("fusekit", ROOT / "fusekit")
    _package("fusekit.kernels", ROOT / "kernels")
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and "jit" in value:
        module, name = value["jit"]
        return getattr(importlib.import_module(module), name)
    if isinstance(value, dict):
        import triton.language as tl

        return tl.dtype(value["dtype"])
    return value


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one specialisation; {"key", "arch", "error"} or the figures read from its code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job["module"]), job["kernel"])
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: job["signature"][name] for name in names},
        constexprs={(names.index(name),): _decode(value) for name, value in job["constexprs"].items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in job["divisible"]},
    )
    printed = io.StringIO()
    found = {"key": job["key"], "arch": job["arch"]}
    target = GPUTarget("hip", "gfx942", 64) if job["arch"] == "gfx942" else GPUTarget("cuda", job["arch"], 32)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            options = {"enable_fp_fusion": True, **job["options"]}
            compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        return {**found, "error": f"{type(error).__name__}: {str(error).strip()[-400:]}"}
    if target.backend == "hip":
        return {**found, **ptx.amd(compiled.asm["amdgcn"]), "products": bool(_dots(compiled.asm["ttir"]))}
    code = read_code(compiled.asm, printed.getvalue(), job["arch"])
    return {
        **found,
        **code,
        "promoted": _promotes(code["mix"], job),
        "shared": compiled.metadata.shared,
        "tensor_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        "loop": read_loop(compiled.asm, job["options"]["num_warps"]) if job["loop"] else None,
        "lost_casts": sass.lost_casts(listing(compiled.asm)) if ptx.casts_to_fp8(compiled.asm["ptx"]) else 0,
    }


def _promotes(mix: dict[str, int], job: dict[str, Any]) -> bool:
    """Whether a kernel that is to add each step's FP8 sum to float32 registers has those additions.

    Asked of sm_90, whose FP8 accumulator is narrow; on sm_100 Triton adds in tensor memory, in float32.
    """
    constants = job["constexprs"]
    if not constants.get("PROMOTE") or job["arch"] != 90:
        return True
    elements = constants["BLOCK_M"] * constants["BLOCK_N"] // (32 * job["options"]["num_warps"])
    return mix.get("add", 0) + mix.get("fma", 0) >= elements


def _dots(ttir: str) -> list[tuple[str, str, str]]:
    """Attributes, rows and operand dtype of every product."""
    return re.findall(r"= tt\.dot (.*) : tensor<(\d+)x\d+x(\w+)> \*", ttir)


def read_loop(asm: dict[str, Any], warps: int) -> dict[str, Any] | None:
    """See sass.hot_loop."""
    return sass.hot_loop(listing(asm), warps, bool(_dots(asm["ttir"])))


def listing(asm: dict[str, Any]) -> str:
    """The machine code, which is what ships: made by the ptxas that comes with this Triton."""
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(disassembler), "-c", "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_code(asm: dict[str, Any], log: str, arch: int) -> dict[str, Any]:
    """Registers, spills and advisories from ptxas' log; from the PTX, whether products use tensor cores."""
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    registers = re.search(r"Used (\d+) registers", log)
    assert registers, f"ptxas said nothing about registers: {log[:200]}"
    wanted = [int(rows) for text, rows, dtype in _dots(asm["ttir"]) if dtype != "f32" or "= tf32" in text]
    instruction = TENSOR_CORE[arch]
    # A warpgroup multiplies 64 rows; smaller tiles use the older instruction on every architecture.
    allowed = [instruction] if wanted and min(wanted) >= 64 else [instruction, "mma.sync"]
    mix = ptx.mix(asm["ptx"])
    is_fp8 = any(dtype.startswith("f8") for _, _, dtype in _dots(asm["ttir"]))
    return {
        "registers": int(registers.group(1)),
        "spills": sum(spills),
        "advisories": sorted({code for code in SERIALISED if code in log}),
        "tensor_cores": mix.get(FP8[arch], 0) > 0
        if is_fp8
        else not wanted or any(name in asm["ptx"] for name in allowed),
        "mix": mix,
    }


def main() -> None:
    prepare()
    jobs = [json.loads(line) for line in sys.stdin]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a cached kernel has no assembler log
        for job in jobs:
            print(json.dumps(compile_job(job)), flush=True)


if __name__ == "__main__":
    main()
