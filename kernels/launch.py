"""The one place where a Triton kernel is started, or recorded instead.

Recording serves the static lane: with `record()` on, ops run on fake tensors exactly as on a GPU, and every
launch they would have made is collected, so what is compiled ahead of time is what ships.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel start: positional run-time arguments, then constexprs and num_warps/num_stages in `meta`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None


def recording() -> bool:
    return _recorded is not None


def on_gpu(x: Tensor) -> bool:
    """Whether the op runs its Triton path: the tensor is on a GPU, or launches are being recorded."""
    return x.is_cuda or _recorded is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Start `kernel` on `grid`; run-time arguments are positional, constexprs and num_warps/num_stages by
    name."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
    elif all(grid):  # an empty tensor has nothing to compute and CUDA refuses an empty grid
        kernel[grid](*args, **meta)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of making them. Use under FakeTensorMode: results are not computed."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous
