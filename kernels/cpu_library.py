"""Passes of the CPU paths that PyTorch would take several operators for: C++ in cpu/, built at first use.

One pass reads each value once, computes in float32 and rounds once, where a composition of ATen operators
passes over float32 copies, and exponentials may go through libraries that are slow on some processors.
Products with float32 sums are there too, which ATen's and oneDNN's bfloat16 products round away.

Where no C++ compiler is installed, or the build fails, `available()` is False and the ATen compositions run:
slower, held to the same criterion. `obstacle()` says why; `fusekit doctor` shows it.

The library is kept in the user's cache folder under a name made of sources, compiler and processor, so
machines that share a home folder do not share machine code. It joins PyTorch's own OpenMP threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-std=c++17")
ACTIVATIONS = ("gelu_tanh", "silu", "quick_gelu", "gelu", "relu", "none")  # by the library's numbers
COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 120


def available() -> bool:
    return _built()[0] is not None


def obstacle() -> str | None:
    """Why there is no library, as a sentence; None: there is one."""
    return _built()[1]


@cache
def multiplies() -> bool:
    """Whether its own bfloat16 products are the fastest here: AVX512-BF16, without AMX, which oneDNN uses."""
    library = _built()[0]
    return library is not None and bool(library.has_products()) and not torch.cpu._is_amx_tile_supported()


def call(name: str, *args: Any) -> Any:
    """Call a C function: tensors as pointers, None as a null pointer, ints as int64, floats as float32.

    The number of threads is the last argument of every function; this adds it.
    """
    library = _built()[0]
    assert library is not None, "callers ask available() first"
    return getattr(library, name)(*map(_argument, args), ctypes.c_int(torch.get_num_threads()))


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Array):
        return value
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


@cache
def _built() -> tuple[ctypes.CDLL | None, str | None]:
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler (c++, g++ or clang++) is installed"
    try:
        return ctypes.CDLL(str(_library(compiler))), None
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} failed: {error.stderr.strip().splitlines()[-1] if error.stderr else error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the build with {compiler} failed: {error}"


def _library(compiler: str) -> Path:
    sources = sorted(SOURCES.glob("*.cpp"))
    path = cache_folder() / f"cpu-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and moved there, so that another process never loads half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run(
            [compiler, *FLAGS, "-fopenmp", "-c", *map(str, sources)],
            cwd=folder, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS,
        )  # fmt: skip
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        subprocess.run(
            [compiler, "-shared", "-o", str(built), *objects, *_openmp()],
            check=True, capture_output=True, text=True, timeout=BUILD_SECONDS,
        )  # fmt: skip
        os.replace(built, path)
    return path


def _openmp() -> list[str]:
    """PyTorch's own OpenMP runtime where it ships one: a second one would start threads of its own."""
    root = Path(torch.__file__).parent
    shipped = [
        *(root / "lib").glob("libgomp*.so*"),
        *(root.parent / "torch.libs").glob("libgomp*.so*"),
    ]
    return [str(shipped[0])] if shipped else ["-fopenmp"]


def cache_folder() -> Path:
    """Where fusekit keeps what it builds and measures on a machine."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusekit"


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=BUILD_SECONDS)
    parts = [compiler, version.stdout, platform.machine(), _processor(), *FLAGS, *_openmp()]
    parts += [source.read_text() for source in sorted(SOURCES.iterdir()) if source.suffix in (".cpp", ".h")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The instruction sets that -march=native builds for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
