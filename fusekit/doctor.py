"""`fusekit doctor`: this machine, its ceilings, what can run here, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table

from fusekit.ceilings import measure_ceilings
from fusekit.gpu_check import remark
from fusekit.kernels import OPS, cpu_library
from fusekit.kernels.linear_cpu import multiplies
from fusekit.meter import machine

PACKAGES = {  # what for
    "triton": "GPU kernels, sanitizer and static lanes",
    "tokenizers": "fusekit train",
    "matplotlib": "plots",
    "transformers": "--hf-config, Hugging Face models",
    "pytest": "tests",
    "hypothesis": "native tests",
    "expecttest": "native tests",
    "pytest-benchmark": "pytest benchmarks",
    "ttsem": "sanitizer lane",
}
OPTIONS = {"ttsem": "--ignore-requires-python --no-deps ttsem==0.1.0"}  # it runs on Python 3.11, too
# Other libraries that the kernel suite measures beside fusekit; all need a CUDA GPU.
RIVALS = ("liger-kernel", "quack-kernels", "flash-attn", "xformers", "transformer-engine", "torchao")


def examine() -> int:
    """Print the findings. 0 where fusekit can train here, 1 where it cannot."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    versions = {name: _version(name) for name in (*PACKAGES, *RIVALS)}
    console.print(_machine())
    console.print(_packages(versions))
    console.print(_available("lanes", _lanes(versions)))
    console.print(_available("providers of fusekit bench", _providers(versions)))
    for line in (_ceilings(), f"ops: {', '.join(OPS) or 'none'}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    problem = _problem()
    if problem:
        print(f"fusekit doctor: {problem}", file=sys.stderr)
    return 1 if problem else 0


def _machine() -> Table:
    rows = {name: str(value) for name, value in machine().items()} | _gpu()
    if not multiplies(torch.bfloat16):
        rows["cpu lacks"] = "16-bit products (AVX512-BF16, AMX): bf16 saves memory here, and no time"
    view = Table(title="machine", title_justify="left", box=None, show_header=False)
    view.add_column(no_wrap=True)
    view.add_column(overflow="fold")
    for name, value in rows.items():
        view.add_row(name, value)
    return view


def _gpu() -> dict[str, str]:
    """Compute capability, memory, and a remark where its like was never checked; a GPU in trouble says so."""
    if not torch.cuda.is_available():
        return {"gpu": "PyTorch finds no CUDA GPU"}
    try:
        free, total = torch.cuda.mem_get_info()
        found = {
            "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "gpu memory": f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free",
        }
        sentence = remark()
    except RuntimeError as error:
        return {"gpu trouble": str(error).splitlines()[0]}
    return found | ({"remark": sentence} if sentence else {})


def _packages(versions: Mapping[str, str | None]) -> Table:
    view = Table(title="packages", title_justify="left", box=None)
    for heading in ("package", "version", "for", "missing: do"):
        view.add_column(heading, overflow="fold")
    for name, purpose in PACKAGES.items():
        version = versions[name]
        view.add_row(name, version or "–", purpose, "" if version else _remedy(name))
    return view


def _available(title: str, found: Mapping[str, str | None]) -> Table:
    view = Table(title=title, title_justify="left", box=None, show_header=False)
    view.add_column(no_wrap=True)
    view.add_column(no_wrap=True)
    view.add_column(overflow="fold")
    for name, obstacle in found.items():
        view.add_row(name, "[green]yes[/]" if obstacle is None else "[yellow]no[/]", obstacle or "")
    return view


def _lanes(versions: Mapping[str, str | None]) -> dict[str, str | None]:
    """What can run here: None, or a sentence with what to do."""

    def needs(*names: str) -> str | None:
        missing = [name for name in names if versions[name] is None]
        return f"needs {', '.join(missing)}: {'; '.join(map(_remedy, missing))}" if missing else None

    linux = None if platform.system() == "Linux" else "needs Linux, natively or in a container"
    gpu = (
        None
        if torch.cuda.is_available()
        else "needs a CUDA GPU and a PyTorch with CUDA: python -m pip install torch"
    )
    return {
        "training": needs("tokenizers"),
        "torch.compile on CPU": _compiler(),
        "compiled CPU passes": cpu_library.obstacle(),
        "native lane": needs("pytest", "hypothesis", "expecttest"),
        "sanitizer lane": linux or needs("pytest", "triton", "ttsem"),
        "static lane": linux or needs("triton"),
        "gpu lane": gpu or needs("pytest", "triton"),
        "pytest benchmarks": needs("pytest", "pytest-benchmark"),
        "plots": needs("matplotlib"),
    }


def _providers(versions: Mapping[str, str | None]) -> dict[str, str | None]:
    found: dict[str, str | None] = {"eager": None, "fusekit": None}
    cuda = torch.cuda.is_available()
    found["compile"] = None if cuda else _compiler()
    for name in RIVALS:
        missing = None if versions[name] else f"is not installed: pip install {name}"
        found[name] = ", and ".join(filter(None, (None if cuda else "needs a CUDA GPU", missing))) or None
    return found


def _compiler() -> str | None:
    if any(map(shutil.which, cpu_library.COMPILERS)):
        return None
    return "needs a C++ compiler: apt-get install g++"


def _ceilings() -> str:
    """What this device can do at most, as the benchmarks measure it: on a CPU with one thread."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure_ceilings(device)
    except RuntimeError as error:  # a GPU without free memory, or one that this PyTorch has no code for
        return f"ceilings of {device.type}: not measured, {str(error).splitlines()[0]}"
    finally:
        torch.set_num_threads(threads)
    rates = ", ".join(f"{name} {rate / 1e9:,.3g} GFLOP/s" for name, rate in found.flops_per_second.items())
    where = "one CPU thread" if device.type == "cpu" else "GPU"
    return f"ceilings, {where}: copy {found.bytes_per_second / 1e9:,.3g} GB/s; product {rates}"


def _remedy(package: str) -> str:
    return f"pip install {OPTIONS.get(package, package)}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problem() -> str | None:
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in torch.__version__.split(".")[:2])
    if version < (2, 11):
        return f"PyTorch {torch.__version__} is too old: fusekit needs 2.11; pip install -U torch"
    return None
