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
# Raised when a reader of older files would misread them.
KERNEL_SCHEMA, TRAFFIC_SCHEMA, MODEL_SCHEMA, QUALITY_SCHEMA = 1, 2, 1, 2
SCHEMAS = {
    "kernels": KERNEL_SCHEMA,
    "traffic": TRAFFIC_SCHEMA,
    "models": MODEL_SCHEMA,
    "quality": QUALITY_SCHEMA,
}
WRITERS = {
    "kernels": "the kernel suite, which `fusekit bench` writes",
    "traffic": "the traffic counter, which `python -m benchmarks.traffic --record` writes",
    "quality": "the quality experiment, which `python -m benchmarks.precision_quality` writes",
    "models": "the model suite, which `fusekit bench models` writes",
}
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
    """A results file of the kernel suite; errors as `read_results`."""
    return read_results(path, "kernels")


def read_results(path: Path, kind: str | None = None) -> dict[str, Any]:
    """A results file of the kind given, or of any kind that this version knows.

    Raises:
        ValueError: it is no such file, or of another schema; the sentence says which and what to do.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON; a results file is written by `fusekit bench`") from None
    its_kind = found.get("kind") if isinstance(found, dict) else None
    if its_kind not in SCHEMAS or kind not in (None, its_kind):
        wanted = WRITERS[kind] if kind else "one of the suites that `fusekit bench` runs"
        what = f"; it is one of {WRITERS[its_kind]}" if its_kind in SCHEMAS else ""
        raise ValueError(f"{path} is not a results file of {wanted}{what}")
    if found.get("schema") != SCHEMAS[its_kind]:
        commit = found.get("environment", {}).get("commit")
        raise ValueError(
            f"{path} has schema {found.get('schema')}, this version reads schema {SCHEMAS[its_kind]}: "
            f"measure again, or read it with the commit that wrote it, {commit or 'of which it says nothing'}"
        )
    return found


def continued(partial: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The results of an interrupted run, to go on with; `new` is what a fresh one would start from.

    Raises:
        ValueError: it was made with other settings, versions or code, or cannot be read.
    """
    old = read_results(partial, new["kind"])
    for part in ("settings", "providers", "environment"):
        before, now = ({k: v for k, v in r[part].items() if k != "date"} for r in (old, new))
        if before != now:
            names = ", ".join(k for k in now if before.get(k) != now[k]) or "an entry"
            raise ValueError(
                f"{partial} holds an interrupted run that differs in {part}: {names}. --fresh starts anew, "
                f"--out writes elsewhere"
            )
    return {name: part for name, part in old.items() if name != "running"} | {"left_out": {}}


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
