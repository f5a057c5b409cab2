"""Warp specialisation of the persistent product, beside the same kernel without: what compilers make of it.

    python -m benchmarks.static.specialised     # writes benchmarks/results/warp_specialisation.json

No row of the shipped tables asks for it; this is the evidence why, docs/benchmarks.md says it in words.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.results_file import RESULTS, environment, write_results
from benchmarks.static import products
from benchmarks.static.build import compile_all, plan
from benchmarks.static.gate import derive
from benchmarks.static.specialisations import Specialisation, specialise
from fusekit.kernels.config_table import Config, Row

FILE = RESULTS / "warp_specialisation.json"
TARGETS = ("sm_90", "sm_100")
TILES = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4))
KEPT = ("registers", "spills", "shared", "warps", "cycles", "bound", "ratio")


def specialisations() -> Iterator[Specialisation]:
    """The forward epilogue on bfloat16, each tile with and without."""
    with FakeTensorMode():
        for m, n, k, warps, stages in TILES:
            for wanted in (False, True):
                config = Config("persistent", m, n, k, warps, stages, 4, wanted)
                row = Row("half", ("nt",), ("forward",), config, 1)
                (start,) = products.launches(row, "sm_90", torch.bfloat16)
                yield replace(specialise(start), targets=TARGETS)


def label(found: Specialisation) -> str:
    blocks = "x".join(str(found.constexprs[f"BLOCK_{letter}"]) for letter in "MNK")
    wanted = ", specialised" if found.constexprs["SPECIALISE"] else ""
    return f"{blocks}, {found.options['num_warps']} warps, {found.options['num_stages']} stages{wanted}"


def measure() -> dict[str, dict[str, Any]]:
    """By "triton 3.8 sm_90", then by tile: figures, or why there are none."""
    found = {s.key: s for s in specialisations()}
    held: dict[str, dict[str, Any]] = {}
    for version, builds in compile_all(plan(found.values(), everything=True), lambda: None).items():
        for (key, arch), figures in builds.items():
            into = held.setdefault(f"triton {version} sm_{arch}", {})
            if "error" in figures:
                into[label(found[key])] = {"error": figures["error"].splitlines()[0]}
            else:
                full = derive(figures, found[key].options["num_warps"])
                into[label(found[key])] = {name: full[name] for name in KEPT if name in full}
    return {name: dict(sorted(builds.items())) for name, builds in sorted(held.items())}


def main(path: Path = FILE) -> int:
    builds = measure()
    write_results(path, {"environment": environment(), "builds": builds})
    for name, by_tile in builds.items():
        for tile, figures in by_tile.items():
            print(f"{name} {tile}: {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
