"""benchmarks/results/static.json: the figures of every gated build, one line a build."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS, environment
from benchmarks.static.build import Jobs, Results
from benchmarks.static.gate import derive
from benchmarks.static.occupancy import ARCHITECTURES
from benchmarks.static.specialisations import Specialisation
from fusekit.checkpoint import replace_text

RECORD = RESULTS / "static.json"
SCHEMA = 2
KEPT = ("made", "registers", "spills", "shared", "blocks", "warps", "limiter", "cycles", "bound", "ratio")


def to_record(specialisations: dict[str, Specialisation], results: Results) -> dict[str, Any]:
    """Figures by kernel, then by "triton 3.8 sm_90"; "loop" is what bounds the hot loop, if it was read."""
    kernels: dict[str, Any] = {}
    for version, found in results.items():
        for (key, arch), figures in found.items():
            if "error" not in figures and arch in ARCHITECTURES:
                full = derive(figures, specialisations[key].options["num_warps"])
                entry = {name: full[name] for name in KEPT if name in full} | {"mix": full["mix"]}
                if full.get("loop"):
                    entry["loop"] = full["loop"]["limit"]
                kernels.setdefault(key, {})[f"triton {version} sm_{arch}"] = entry
    return {key: kernels[key] for key in sorted(kernels)}


def joined(kernels: dict[str, Any], before: dict[str, Any], planned: Jobs) -> dict[str, Any]:
    """These builds, and of a record made before those that are still planned and were not made again."""
    found = {key: dict(builds) for key, builds in kernels.items()}
    for version, jobs in planned.items():
        for job in jobs:
            name, builds = f"triton {version} sm_{job['arch']}", before.get(job["key"], {})
            if name in builds:
                found.setdefault(job["key"], {}).setdefault(name, builds[name])
    order = {f"triton {version} sm_{arch}": i for i, (version, arch) in enumerate(_names(planned))}
    return {key: dict(sorted(found[key].items(), key=lambda x: order[x[0]])) for key in sorted(found)}


def _names(planned: Jobs) -> Iterator[tuple[str, int]]:
    return ((version, arch) for version in planned for arch in ARCHITECTURES)


def write(kernels: dict[str, Any], path: Path = RECORD) -> None:
    """The file with its header; a build a line, so that a change of one is a change of one line."""
    head = json.dumps({"kind": "static", "schema": SCHEMA, "environment": environment()}, indent=1)
    lines = []
    for key, builds in kernels.items():
        entries = ",\n".join(f"   {json.dumps(name)}: {json.dumps(build)}" for name, build in builds.items())
        lines.append(f"  {json.dumps(key)}: {{\n{entries}\n  }}")
    path.parent.mkdir(exist_ok=True)
    body = ",\n".join(lines)
    replace_text(path, f'{head[:-2]},\n "kernels": {{\n{body}\n }}\n}}\n')


def read(path: Path = RECORD) -> dict[str, Any]:
    """Kernels of the record; none if there is no file.

    Raises:
        ValueError: the file is of another kind or schema.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found.get("kind") != "static" or found.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} is not a record of schema {SCHEMA}: python -m benchmarks.static --record writes it anew"
        )
    return found["kernels"]
