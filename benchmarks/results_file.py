"""Results files: JSON with the machine, the versions and the commit, always whole on disk."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from fusekit.checkpoint import replace_text
from fusekit.meter import machine

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "benchmarks" / "results"
KERNEL_SCHEMA = 1  # of the kernel suite's files; raised when a reader of older files would misread them
NUMBERS = re.compile(r"\[\s+(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\s+\]")


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date of the measurement."""
    return machine() | {"commit": _commit(), "date": datetime.date.today().isoformat(), "triton": _triton()}


def write_results(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    replace_text(path, NUMBERS.sub(_one_line, text) + "\n")


def _one_line(numbers: re.Match[str]) -> str:
    return "[" + " ".join(numbers[1].split()) + "]"


def read_kernels(path: Path) -> dict[str, Any]:
    """A results file of the kernel suite.

    Raises:
        ValueError: it is no such file, or of another schema; the sentence says which and what to do.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON; a results file is written by `fusekit bench`") from None
    if not isinstance(found, dict) or found.get("kind") != "kernels":
        raise ValueError(f"{path} is not a results file of the kernel suite, which `fusekit bench` writes")
    if found.get("schema") != KERNEL_SCHEMA:
        raise ValueError(
            f"{path} has schema {found.get('schema')}, this version reads schema {KERNEL_SCHEMA}: measure "
            f"again, or read it with the commit that wrote it, {found.get('environment', {}).get('commit')}"
        )
    return found


def _commit() -> str:
    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    try:
        # Results are no code: a run that writes some must not look like another version to its continuation.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except OSError:  # no git: an unpacked archive
        return ""


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
