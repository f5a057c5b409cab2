"""Host time of the ops from their call to the driver, forward and backward, without a GPU or on one.

    python -m benchmarks.launch_path --out benchmarks/results/launch_path.json [--ops mlp attention]
                                     [--earlier FILE]

What a small model pays on a GPU is what the host takes to hand it its kernels. Each op is called as a
training step calls it, with tensors that require gradients, then differentiated; tensors are so small that
their sizes take no time. Without a GPU Triton's launcher calls a stub of the driver (driver_stub.py): process
time of one thread, PyTorch's CPU allocator, and of the driver nothing. On a GPU: time until the host is
through, with everything. Figures are the least of several rounds, in microseconds a call. Eager layers on the
same machine are the scale; what they compute is in their figures on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results_file import environment, write_results
from fusekit.kernels import tape

CALLS = 50
ROUNDS = 15
B, T, C, HEADS, VOCABULARY = 1, 16, 64, 4, 256
DTYPE = torch.bfloat16
Call = Callable[[], Any]


class Timed(NamedTuple):
    """Microseconds of the host, and kernels started where the stub counted them."""

    forward: float
    backward: float
    forward_kernels: int
    backward_kernels: int


def cases(device: torch.device) -> dict[str, Call]:
    """Every op of a training step, and eager's layers."""
    ops = torch.ops.fusekit

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=DTYPE, device=device).requires_grad_()

    def heads() -> Tensor:
        x = torch.randn(B, T, HEADS, C // HEADS, dtype=DTYPE, device=device)
        return x.transpose(1, 2).requires_grad_()

    x, residual, norm, shift = make(B, T, C), make(B, T, C), make(C), make(C)
    first, bias, second = make(4 * C, C), make(4 * C), make(C, 4 * C)
    up, w_q, w_k, w_v, head = make(4 * C, C), make(C, C), make(C, C), make(C, C), make(VOCABULARY, C)
    q, k, v, head_norm = heads(), heads(), heads(), make(C // HEADS)
    mask = torch.ones(B, 1, T, T, dtype=torch.bool, device=device)
    cos, sin = (torch.randn(1, 1, T, C // HEADS, dtype=DTYPE, device=device) for _ in range(2))
    targets = torch.randint(VOCABULARY, (B * T,), device=device)
    return {
        "add_layer_norm": lambda: ops.add_layer_norm(x, residual, norm, shift, 1e-5),
        "add_rms_norm": lambda: ops.add_rms_norm(x, residual, norm, 1e-5),
        "linear_act": lambda: ops.linear_act(x, first, bias, None, "gelu_tanh"),
        "mlp": lambda: ops.mlp(x, first, bias, second, shift, residual, "gelu_tanh"),
        "gated_mlp": lambda: ops.gated_mlp(x, first, up, second),
        "qkv_linear": lambda: ops.qkv_linear(x, w_q, w_k, w_v, norm, norm, norm),
        "rope": lambda: ops.rope(q, cos, sin),
        "rms_norm_rope": lambda: ops.rms_norm_rope(q, head_norm, cos, sin, 1e-6),
        "attention": lambda: ops.attention(q, k, v, None, True),
        "attention, mask": lambda: ops.attention(q, k, v, mask),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, head, None, targets),
        "linear_fp8": lambda: ops.linear_fp8(x, first, bias),
        "eager linear": lambda: F.linear(x, first, bias),
        "eager layer norm": lambda: F.layer_norm(x, (C,), norm, shift),
        "eager attention": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }


def timed(call: Call, device: torch.device, launches: Callable[[], int]) -> Timed:
    """The least time of a call over rounds; what it saved is kept until all of a round are differentiated."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    grads: list[Tensor] = []

    def forward() -> list[Tensor]:
        returned = call()
        return [y for y in (returned if isinstance(returned, tuple) else [returned]) if y.requires_grad]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    counts = [0, 0, 0]
    for _ in range(tape.PATIENT + 4):  # noted, watched, compared, and played from then on
        counts[0] = launches()
        outputs = forward()
        counts[1] = launches()
        grads = [torch.ones_like(y) for y in outputs]
        torch.autograd.backward(outputs, grads)
        counts[2] = launches()
    forward_time = backward_time = float("inf")
    for _ in range(ROUNDS):
        wait()
        started = clock()
        returned = [call() for _ in range(CALLS)]
        called = clock()
        wait()
        kept = [[y for y in (r if isinstance(r, tuple) else [r]) if y.requires_grad] for r in returned]
        began = clock()
        for outputs in kept:
            torch.autograd.backward(outputs, grads)
        forward_time = min(forward_time, (called - started) / CALLS * 1e6)
        backward_time = min(backward_time, (clock() - began) / CALLS * 1e6)
    return Timed(forward_time, backward_time, counts[1] - counts[0], counts[2] - counts[1])


def measure(names: list[str] | None = None) -> dict[str, Timed]:
    """Microseconds by op; None: of all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.ExitStack() as stack:
        launches: Callable[[], int] = lambda: 0  # noqa: E731
        if device.type == "cpu":
            from benchmarks.driver_stub import stubbed

            launches = stack.enter_context(stubbed())
        gc.collect()
        gc.disable()  # its rounds fall on whoever is called just then
        stack.callback(gc.enable)
        torch.manual_seed(0)
        chosen = cases(device)
        return {name: timed(chosen[name], device, launches) for name in names or chosen}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_path", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=list(cases(torch.device("cpu"))), help="all by default")
    parser.add_argument("--out", type=Path, help="results file; without it the figures are only printed")
    parser.add_argument(
        "--earlier", type=Path, help="a results file of this machine and another commit, to be kept beside"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    times = measure(options.ops)
    print(f"{'µs of the host':22} {'forward':>8} {'backward':>9}  kernels")
    for name, t in times.items():
        kernels = f"{t.forward_kernels}, {t.backward_kernels}" if t.forward_kernels else ""
        print(f"{name:22} {t.forward:8.1f} {t.backward:9.1f}  {kernels}")
    if options.out:
        ops = {name: t._asdict() for name, t in times.items()}
        where = "a GPU" if torch.cuda.is_available() else "a CPU, the driver a stub"
        held = {"environment": environment(), "where": where, "ops": ops}
        if options.earlier:
            earlier = json.loads(options.earlier.read_text(encoding="utf-8"))
            held["earlier"] = {"commit": earlier["environment"]["commit"], "ops": earlier["ops"]}
        write_results(options.out, held)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
