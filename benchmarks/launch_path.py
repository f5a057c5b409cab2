"""Host time of linear_act from graph to launch, on a CPU: the driver's part is replaced by nothing.

    python -m benchmarks.launch_path --out benchmarks/results/launch_path.json

Tensors are on the CPU and the op is told that they are on a GPU; Triton's own binder is left out from the
second start on, as on a GPU, and what it would hand to the driver goes to a function that returns. Reported
are medians of process time: one matrix product from its call to the driver's, and the op's forward with and
without it, as PyTorch dispatches it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.results_file import environment, write_results
from fusekit.kernels import config_table, gemm, launch, linear_act

CALLS = 200
ROUNDS = 15


class Compiled:
    """Stands for what Triton compiled: started, it does nothing."""

    packed_metadata = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: None


@contextmanager
def stubbed() -> Iterator[None]:
    """linear_act takes its GPU path, with the table of sm_90, and no kernel starts."""
    table = config_table.load("sm_90")
    with (
        mock.patch.object(linear_act, "on_gpu", lambda x: True),
        mock.patch.object(config_table, "for_device", lambda index: table),
        mock.patch.object(launch, "launch", lambda *args, **meta: Compiled()),
        mock.patch.dict(gemm._plans, clear=True),
        mock.patch.dict(gemm._sums, clear=True),
    ):
        yield


def microseconds(call: Callable[[], Any]) -> float:
    """Median over rounds of one call's process time."""
    taken = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(CALLS):
            call()
        taken.append((time.process_time() - started) / CALLS * 1e6)
    return statistics.median(taken)


def measure() -> dict[str, float]:
    """Microseconds of the parts of one forward call of linear_act with bias and GELU that saves z."""
    x = torch.randn(256, 512, dtype=torch.bfloat16)
    weight, bias = torch.randn(1024, 512, dtype=torch.bfloat16), torch.randn(1024, dtype=torch.bfloat16)
    y, z = x.new_empty(256, 1024), x.new_empty(256, 1024)
    transposed = weight.t()

    def whole() -> Any:
        return linear_act.forward_op(x, weight, bias, None, "gelu_tanh", False, True)

    with torch.no_grad(), stubbed():
        whole()  # plans
        times = {
            "matmul": microseconds(lambda: gemm.matmul(x, transposed, y, bias=bias, act="gelu_tanh", z=z)),
            "forward_op": microseconds(whole),
        }
        with mock.patch.object(linear_act, "_forward_triton", lambda *args: None):
            times["forward_op without matmul"] = microseconds(whole)
        times["two empty outputs"] = microseconds(lambda: (x.new_empty(256, 1024), x.new_empty(256, 1024)))
    return times


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_path", description=__doc__)
    parser.add_argument("--out", type=Path, help="results file; without it the figures are only printed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    times = measure()
    for name, value in times.items():
        print(f"{name:28} {value:6.2f} µs")
    if options.out:
        write_results(options.out, {"environment": environment(), "microseconds": times})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
