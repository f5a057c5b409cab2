"""What the device itself can do, measured: bytes a second of a large copy, FLOP/s of a large matrix product.

No kernel is faster than both allow: time >= max(bytes / copy, FLOPs / product). Shares of a ceiling in
reports are shares of these figures, taken on the same machine in the same run, not of a data sheet's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # twice a common last-level cache, ten times a GPU's
PRODUCT_SIZE = {"cpu": 768, "cuda": 8192}
LEAST_SIZE = 192  # where the CPU emulates a dtype, a small product says as much
REPEATS = 5
SLOW_SECONDS = 0.05  # a product that takes longer is not repeated


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """bytes_per_second: read and written by a copy. flops_per_second: of a product, by dtype name."""

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def products(self, dtype: str) -> float:
        """The fastest way to multiply values of a dtype: itself, or exactly, in float32."""
        return max(self.flops_per_second.get(name, 0.0) for name in (dtype, "float32"))

    def least_seconds(self, flops: float, moved: float, dtype: str) -> float:
        """No kernel that does so many operations and moves so many bytes can be faster."""
        return max(flops / self.products(dtype), moved / self.bytes_per_second)


def measure_ceilings(
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    *,
    copy_bytes: int | None = None,
    size: int | None = None,
) -> Ceilings:
    """The best of a few repeats each: about a second on a CPU, with the threads PyTorch is set to."""
    copy_bytes = copy_bytes or COPY_BYTES[device.type]
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device)
    rates = {
        str(dtype).removeprefix("torch."): _product(dtype, device, size or PRODUCT_SIZE[device.type])
        for dtype in dict.fromkeys((torch.float32, *dtypes))
    }
    return Ceilings(bytes_per_second=2 * copy_bytes / seconds, flops_per_second=rates)


def _product(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """FLOP/s of a product of two square matrices; smaller ones where this dtype turns out to be slow."""
    for edge in (min(LEAST_SIZE, size), size):
        a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        seconds = _best(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        if seconds * (size / edge) ** 3 > SLOW_SECONDS:
            break
    return 2 * edge**3 / seconds


def _best(call: Callable[[], Any], device: torch.device) -> float:
    call()
    return min(_seconds(call, device) for _ in range(REPEATS))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        # One thread's process time does not count what else the machine does; more threads would add up.
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        call()
        return max(clock() - started, 1e-9)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3
