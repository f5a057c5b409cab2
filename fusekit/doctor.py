"""`fusekit doctor`: what is installed, what can run here, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys

import torch
from rich.console import Console
from rich.table import Table

from fusekit.ceilings import measure_ceilings
from fusekit.kernels import OPS
from fusekit.kernels.linear_cpu import multiplies
from fusekit.meter import machine

PACKAGES = (  # name, what for, how to get it
    ("triton", "GPU kernels, sanitizer and static lanes", "pip install triton"),
    ("tokenizers", "fusekit train", "pip install 'fusekit-compiler[train]'"),
    ("matplotlib", "plots", "pip install 'fusekit-compiler[train]'"),
    ("transformers", "--hf-config", "pip install 'fusekit-compiler[models]'"),
    ("pytest", "tests", "pip install 'fusekit-compiler[tests]'"),
    ("ttsem", "sanitizer lane", "pip install --ignore-requires-python --no-deps ttsem==0.1.0"),
    ("cuxray", "static lane", "pip install cuxray"),
)


def examine() -> int:
    """Print the findings. 0 where fusekit can train here, 1 where it cannot."""
    console = Console()
    console.print(
        *(f"[bold]{name}[/] {value}" for name, value in machine().items()), sep="\n", highlight=False
    )
    table = Table(title="packages", title_justify="left", box=None)
    for heading in ("package", "version", "for", "missing: do"):
        table.add_column(heading)
    versions = {name: _version(name) for name, _, _ in PACKAGES}
    for name, purpose, remedy in PACKAGES:
        table.add_row(name, versions[name] or "-", purpose, "" if versions[name] else remedy)
    console.print(table)
    for name, obstacle in _lanes(versions).items():
        console.print(f"{name:24} {'yes' if obstacle is None else 'no: ' + obstacle}", highlight=False)
    _print_ceilings(console)
    console.print(f"ops: {', '.join(OPS) or 'none'}", highlight=False)
    problem = _problem()
    if problem:
        print(f"fusekit doctor: {problem}", file=sys.stderr)
    return 1 if problem else 0


def _print_ceilings(console: Console) -> None:
    """What this device can do at most, as the benchmarks measure it: on a CPU with one thread."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure_ceilings(device)
    except RuntimeError as error:  # a GPU without free memory, or one that this PyTorch has no code for
        console.print(
            f"ceilings of {device.type}: not measured, {str(error).splitlines()[0]}", highlight=False
        )
        return
    finally:
        torch.set_num_threads(threads)
    rates = ", ".join(f"{name} {rate / 1e9:,.3g} GFLOP/s" for name, rate in found.flops_per_second.items())
    where = "one CPU thread" if device.type == "cpu" else "GPU"
    console.print(
        f"ceilings, {where}: copy {found.bytes_per_second / 1e9:,.3g} GB/s; product {rates}",
        highlight=False,
        soft_wrap=True,
    )


def _lanes(versions: dict[str, str | None]) -> dict[str, str | None]:
    """What can run here: None, or what is missing."""

    def needs(*names: str) -> str | None:
        missing = [name for name in names if versions[name] is None]
        return f"{', '.join(missing)} not installed" if missing else None

    linux = None if platform.system() == "Linux" else "needs Linux"
    gpu = None if torch.cuda.is_available() else "PyTorch finds no CUDA GPU"
    compiler = (
        None if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"
    )
    return {
        "training": needs("tokenizers"),
        "fast bf16 on this CPU": None
        if multiplies(torch.bfloat16)
        else "no AVX512-BF16 or AMX; it is emulated",
        "torch.compile on CPU": compiler,
        "native lane": needs("pytest"),
        "sanitizer lane": linux or needs("pytest", "triton", "ttsem"),
        "static lane": linux or needs("triton", "cuxray"),
        "gpu lane": gpu or needs("pytest", "triton"),
    }


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
