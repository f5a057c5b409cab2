"""Results files: JSON with the machine, the versions and the commit, always whole on disk."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from fusekit.checkpoint import replace_text
from fusekit.meter import machine

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "benchmarks" / "results"


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date of the measurement."""
    return machine() | {"commit": _commit(), "date": datetime.date.today().isoformat(), "triton": _triton()}


def write_results(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(results, indent=1) + "\n")


def _commit() -> str:
    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except OSError:  # no git: an unpacked archive
        return ""


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
