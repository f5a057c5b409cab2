"""Rivals from a folder of wheels: small, pure Python, installed without network and without dependencies."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

LARGEST_BYTES = 32 << 20
BINARY = (".so", ".pyd", ".dll", ".dylib", ".a", ".o")
KEPT = ("torch", "triton", "pytorch-triton", "numpy", "fusekit-compiler")  # what is measured stays as it is


def install(folder: Path) -> dict[str, str]:
    """Install what is fit; per file, or for the folder itself, one sentence of what happened."""
    if not folder.is_dir():
        return {str(folder): "no such folder; WHEELS names a folder of .whl files"}
    if sys.prefix == sys.base_prefix:
        return {str(folder): "not installed: this Python is no virtual environment; make gpu sets one up"}
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return {str(folder): "holds no .whl files"}
    return {wheel.name: _install(wheel) for wheel in wheels}


def _install(wheel: Path) -> str:
    reason = refusal(wheel)
    if reason:
        return f"refused: {reason}"
    options = ["--no-index", "--no-deps", "--find-links", str(wheel.parent), "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, str(wheel)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "not installed: pip took more than a minute"
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "pip failed without a message").splitlines()
        return f"not installed: {said[-1]}"
    return _installed(distribution(wheel))


def refusal(wheel: Path) -> str | None:
    """Why a wheel is not installed, as a sentence; None: it is small and pure Python."""
    if distribution(wheel) in KEPT or distribution(wheel).startswith("nvidia-"):
        return f"{distribution(wheel)} stays as it is on this machine"
    if wheel.stat().st_size > LARGEST_BYTES:
        return f"{wheel.stat().st_size >> 20} MiB are more than the {LARGEST_BYTES >> 20} of a small wheel"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "it is not a whole zip archive; download it again"
    binary = next((name for name in names if name.endswith(BINARY) or ".so." in name), None)
    if binary or not wheel.name.endswith("-none-any.whl"):
        return f"it is not pure Python: {binary or 'its name does not end in -none-any.whl'}"
    return None


def distribution(wheel: Path) -> str:
    """The normalised name, as in liger_kernel-0.6.2-py3-none-any.whl."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def _installed(name: str) -> str:
    importlib.invalidate_caches()
    found = importlib.metadata.distribution(name)
    missing = sorted({need for need in map(_needed, found.requires or []) if need and not _present(need)})
    return f"installed {found.version}" + (
        f"; without {', '.join(missing)}, which it names" if missing else ""
    )


def _needed(requirement: str) -> str | None:
    """The distribution's name; None for an extra's, or another platform's."""
    if ";" in requirement:
        return None
    return re.split(r"[\s\[(<>=!~]", requirement, maxsplit=1)[0]


def _present(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
