"""Host time of the matrix-product ops from graph to launch, on a CPU: the driver's part is nothing.

    python -m benchmarks.launch_path --out benchmarks/results/launch_path.json

Tensors are on the CPU and the ops are told that they are on a GPU; Triton's own binder is left out from the
second start on, as on a GPU, and what it would hand to the driver goes to a function that returns. Reported
are medians of process time. An op's own time is what a call takes beyond one of an op of the same schema
that makes the results and computes nothing: PyTorch's dispatch and allocation. The aim is 10 µs for every
kernel that an op starts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.results_file import environment, write_results
from fusekit.kernels import (
    config_table,
    feed_forward,
    feed_forward_gpu,
    gated_gemm,
    gemm,
    launch,
    linear_act,
    linear_gpu,
    qkv_gemm,
    qkv_linear,
)

CALLS = 200
ROUNDS = 15
PLANS = (gemm._plans, gemm._sums, linear_gpu._dacts, feed_forward_gpu._hidden_passes, gated_gemm._plans,
         qkv_gemm._plans)  # fmt: skip
M, K, N = 256, 512, 1024


class Compiled:
    """Stands for what Triton compiled: started, it counts."""

    packed_metadata = ()
    starts = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*args: Any) -> None:
            Compiled.starts += 1

        return start


@contextmanager
def stubbed() -> Iterator[None]:
    """The ops take their GPU path, with the table of sm_90, and no kernel starts."""
    table = config_table.load("sm_90")
    with ExitStack() as stack:
        for module in (linear_act, feed_forward, qkv_linear):
            stack.enter_context(mock.patch.object(module, "on_gpu", lambda x: True))
        stack.enter_context(mock.patch.object(config_table, "for_device", lambda index: table))
        stack.enter_context(mock.patch.object(launch, "launch", lambda *args, **meta: Compiled()))
        for plans in PLANS:
            stack.enter_context(mock.patch.dict(plans.held, clear=True))
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


class Timed(NamedTuple):
    """One op: the whole call, dispatch and allocation alone, and the kernels that it starts."""

    call: float
    dispatch: float
    kernels: int

    @property
    def own(self) -> float:
        return self.call - self.dispatch


_library = torch.library.Library("fusekit_launch_path", "FRAGMENT")
_defined: dict[str, Any] = {}


def _dispatch_alone(overload: Any, empty: Callable[..., Any]) -> Any:
    """An op of the same schema that makes the results and leaves them empty."""
    name = overload._opname
    if name not in _defined:
        _library.define(str(overload._schema).removeprefix("fusekit::"))
        _library.impl(name, empty, "CPU")
        _defined[name] = getattr(torch.ops.fusekit_launch_path, name).default
    return _defined[name]


def timed(overload: Any, empty: Callable[..., Any], args: tuple[Any, ...]) -> Timed:
    overload(*args)  # settles the plans
    overload(*args)  # each kernel's second start is its first without the binder
    before = Compiled.starts
    overload(*args)
    kernels = Compiled.starts - before
    alone = _dispatch_alone(overload, empty)
    return Timed(microseconds(lambda: overload(*args)), microseconds(lambda: alone(*args)), kernels)


def cases() -> dict[str, tuple[Any, Callable[..., Any], tuple[Any, ...]]]:
    """The inner ops of a training step, forward and backward: the op, its empty results, its arguments."""

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    x, y, hidden = make(M, K), make(M, K), make(M, N)
    first, second, out = make(N, K), make(N, K), make(K, N)
    bias, narrow, features = make(N), make(128, K), make(128)
    whole = [True] * 3
    three, biases = [make(K, K), narrow, narrow], [make(K), features, features]
    gated = (x, [first, second], [None, None], out, None, None, "silu", "gated", False, True)
    mlp = (x, [first], [bias], out, make(K), None, "gelu_tanh", "plain", False, True)
    needs = [True, True, True, False, False, True, False]
    three_grads = [make(M, K), make(M, 128), make(M, 128)]
    modules = (linear_act, feed_forward, qkv_linear)
    linear, both, qkv = ((module._empty_forward, module._empty_backward) for module in modules)
    return {
        "linear_act forward": (
            linear_act.forward_op, linear[0], (x, first, bias, None, "gelu_tanh", False, True)
        ),
        "linear_act backward": (
            linear_act.backward_op, linear[1], (hidden, x, first, hidden, "gelu_tanh", False, whole)
        ),
        "mlp forward": (feed_forward.forward_op, both[0], mlp),
        "mlp backward": (
            feed_forward.backward_op, both[1],
            (y, x, [first], out, [hidden], "gelu_tanh", "plain", False, [True] * 5),
        ),
        "gated_mlp forward": (feed_forward.forward_op, both[0], gated),
        "gated_mlp backward": (
            feed_forward.backward_op, both[1],
            (y, x, [first, second], out, [hidden, hidden.clone()], "silu", "gated", False, needs),
        ),
        "qkv_linear forward": (qkv_linear.forward_op, qkv[0], (x, three, biases, False)),
        "qkv_linear backward": (
            qkv_linear.backward_op, qkv[1], (three_grads, x, three, False, [True] * 7)
        ),
    }  # fmt: skip


def measure() -> dict[str, Timed]:
    with torch.no_grad(), stubbed():
        return {name: timed(*case) for name, case in cases().items()}


def product() -> float:
    """Microseconds from a call of `matmul` with bias, GELU and z to its launch."""
    x, weight, bias = (torch.randn(s, dtype=torch.bfloat16) for s in ((M, K), (N, K), (N,)))
    y, z, transposed = x.new_empty(M, N), x.new_empty(M, N), weight.t()

    def call() -> None:
        gemm.matmul(x, transposed, y, bias=bias, act="gelu_tanh", z=z)

    with torch.no_grad(), stubbed():
        call()
        return microseconds(call)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_path", description=__doc__)
    parser.add_argument("--out", type=Path, help="results file; without it the figures are only printed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    alone, times = product(), measure()
    print(f"{'matmul':22} {alone:6.2f} µs")
    for name, t in times.items():
        print(
            f"{name:22} {t.call:6.2f} µs, {t.dispatch:5.2f} of them dispatch: {t.own:5.2f} µs of its own "
            f"for {t.kernels} kernels, {t.own / t.kernels:5.2f} each"
        )
    if options.out:
        own = {name: {"own": t.own, "own_a_kernel": t.own / t.kernels} for name, t in times.items()}
        ops = {name: t._asdict() | own[name] for name, t in times.items()}
        held = {"environment": environment(), "microseconds": {"matmul": alone}, "ops": ops}
        write_results(options.out, held)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
