"""Bytes that the norm kernels move, counted, against the least that any kernel could move.

`python -m benchmarks.traffic --norms` runs each kernel program by program in Triton's interpreter, whose
loads and stores are hooked. Counted is what a launch must bring from and to memory if the caches are perfect:
each byte once for reading and once for writing. So re-reading the weight for every row is free, but
statistics, partial sums of weight gradients, and what a second launch reads again are not. Addresses and
masks are right in the interpreter even where its bfloat16 arithmetic is not, and they do not depend on the
data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 1.05  # counted over minimum

# Partial sums are one row per multiprocessor, 132 here, so the number of rows decides what they weigh: a
# batch of 8 sequences of 1024 tokens. The width does not matter: they grow with it like everything else.
ROWS, COLUMNS = 8192, 512

PARAMETERS = {"add_layer_norm": 2, "add_rms_norm": 1}


@dataclass
class Counter:
    """Which elements of which storages one launch reads and writes."""

    starts: list[int] = field(default_factory=list)
    read: list[np.ndarray] = field(default_factory=list)
    written: list[np.ndarray] = field(default_factory=list)

    def watch(self, arguments: tuple[Any, ...]) -> None:
        """Start anew, for a launch on these arguments."""
        storages = {}
        for a in arguments:
            if hasattr(a, "untyped_storage"):
                storages[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
        self.starts = sorted(storages)
        self.read, self.written = ([np.zeros(storages[s], bool) for s in self.starts] for _ in range(2))

    def mark(self, maps: list[np.ndarray], addresses: np.ndarray, active: np.ndarray, width: int) -> None:
        addresses = np.broadcast_to(addresses, active.shape)[active].astype(np.int64)
        if addresses.size:
            storage = bisect_right(self.starts, int(addresses.min())) - 1
            offsets = addresses - self.starts[storage]
            for byte in range(width):
                maps[storage][offsets + byte] = True

    @property
    def bytes(self) -> int:
        return sum(int(m.sum()) for m in (*self.read, *self.written))


def install(counter: Counter) -> None:
    """Hook the interpreter's loads and stores. The process runs with TRITON_INTERPRET=1."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        counter.mark(counter.read, pointers.data, mask.data, width)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        counter.mark(counter.written, pointers.data, mask.data, width)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store


def run(launches: list[Any], counter: Counter) -> int:
    """Interpret the launches and return the bytes they move."""
    total = 0
    for start in launches:
        counter.watch(start.args)
        start.kernel[start.grid](*start.args, **start.meta)
        total += counter.bytes
    return total


def minimum(name: str, M: int, N: int, width: int) -> dict[str, int]:
    """Each input read once, each output written once; h and its gradient belong to both.

    forward: x, residual -> y, h.  backward: dy, dh, h -> dx (which is also the gradient of the residual).
    """
    parameters = PARAMETERS[name]
    matrix, row = M * N * width, N * width
    return {
        "forward": 4 * matrix + parameters * row,
        "backward": 4 * matrix + row + parameters * row,  # the bias is not needed for its own gradient
    }


def count(name: str, M: int, N: int, counter: Counter) -> dict[str, int]:
    """Bytes of one op's forward and backward launches, bfloat16, with a residual."""
    import torch

    from fusekit.kernels import OPS
    from fusekit.kernels.launch import record

    x, residual = (torch.randn(M, N).to(torch.bfloat16).requires_grad_() for _ in range(2))
    parameters = [torch.randn(N).to(torch.bfloat16).requires_grad_() for _ in range(PARAMETERS[name])]
    with record() as forward:
        y, h = OPS[name].fused(x, residual, *parameters, 1e-5)
    with record() as backward:
        torch.autograd.grad((y, h), (x, residual, *parameters), (torch.ones_like(y), torch.ones_like(h)))
    return {"forward": run(forward, counter), "backward": run(backward, counter)}


def measure(M: int = ROWS, N: int = COLUMNS) -> dict[str, Any]:
    """Counted and least bytes and their ratio, by op and direction; in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.traffic.norms", str(M), str(N)]
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def _count_all(M: int, N: int) -> dict[str, Any]:
    counter = Counter()
    install(counter)
    results: dict[str, Any] = {}
    for name in PARAMETERS:
        least, counted = minimum(name, M, N, 2), count(name, M, N, counter)
        for direction in least:
            ratio = counted[direction] / least[direction]
            results[f"{name} {direction}"] = {
                "rows": M,
                "columns": N,
                "dtype": "bfloat16",
                "counted": counted[direction],
                "minimum": least[direction],
                "ratio": round(ratio, 5),
            }
    return results


if __name__ == "__main__":
    print(json.dumps(_count_all(int(sys.argv[1]), int(sys.argv[2]))))
