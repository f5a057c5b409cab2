"""Every op of the registry as a pytest-benchmark test: `pytest benchmarks`, from a checkout.

A wrong result fails, a provider that is not here is skipped with what to install. Times are those of the
kernel suite's clock: process time of one thread on a CPU, CUDA events on a GPU.
"""

from __future__ import annotations

from typing import Any

from benchmarks.cell import Bench, Cell


def test_kernel(cell: Cell, bench: Bench, benchmark: Any) -> None:
    bench.measure(cell, benchmark)
