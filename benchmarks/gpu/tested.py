"""tests/gpu in a process of its own: the command, and what its record says.

The record has one line of JSON for each test as it ends (`benchmarks.gpu.recorder` writes it), so a run that
is stopped keeps what it found; pytest's own output is beside it with the suffix .log.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

WORKERS = 6  # most of a test's first run is compiling on the CPU; with pytest-xdist that runs side by side
WORKER_BYTES = 6 << 30  # of GPU memory


def obstacle() -> str | None:
    if importlib.util.find_spec("pytest") is None:
        return "needs pytest, which is not installed: pip install pytest"
    return None


def command(record: Path, *, dry: bool) -> list[str]:
    """On a CPU the dry run takes a few tests that need no GPU, in place of tests/gpu."""
    record.unlink(missing_ok=True)
    found = [sys.executable, "-m", "pytest", "tests/test_pattern.py" if dry else "tests/gpu"]
    found += ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.recorder"]
    workers = 1 if dry else _workers()
    return [*found, "--record", str(record), *(["-n", str(workers)] if workers > 1 else [])]


def _workers() -> int:
    if importlib.util.find_spec("xdist") is None:
        return 1
    return min(WORKERS, (os.cpu_count() or 1) // 2, torch.cuda.mem_get_info()[0] // WORKER_BYTES)


def outcome(record: Path, code: int | None, limit: float) -> dict[str, Any]:
    """What the tests say.

    Args:
        code: pytest's exit code; None where it was stopped at `limit` seconds, negative for a signal.
    """
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    counts = Counter(test["outcome"] for test in found)
    failures = [f"{t['test']}: {t['message']}" for t in found if t["outcome"] == "failed"]
    described = {"counts": dict(counts), "failures": failures}
    log = record.with_suffix(".log")
    if code in (0, 1) and found:
        return described | {"status": "complete", "reason": ""}
    if code is None:
        reason = (
            f"stopped after {limit:.0f} s with {len(found)} tests done; the next run finds kernels compiled"
        )
        return described | {"status": "incomplete", "reason": reason}
    last = (log.read_text(encoding="utf-8").strip().splitlines() or [""])[-1] if log.exists() else ""
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    reason = f"pytest ended with {ended} after {len(found)} tests: {last} ({log} has its output)"
    return described | {"status": "failed", "reason": reason}
