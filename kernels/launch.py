"""The one place where a Triton kernel is started, or recorded instead.

Recording serves the static lane: with `record()` on, ops run on fake tensors exactly as on a GPU, and every
launch they would have made is collected, so what is compiled ahead of time is what ships.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusekit.kernels._triton import triton

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """One kernel start: positional run-time arguments, then constexprs and num_warps/num_stages in `meta`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None
_target = "sm_90"


def recording() -> bool:
    return _recorded is not None


def recorded_target() -> str:
    """The architecture whose launches are being recorded."""
    return _target


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of x's GPU, or of the architecture whose launches are being recorded."""
    if _recorded is not None:
        return divmod(int(_target.removeprefix("sm_")), 10)
    if not torch.backends.cuda.is_built():  # kernels run from their IR on a CPU: the sanitizer lane
        return 9, 0
    return torch.cuda.get_device_capability(x.device)


def on_gpu(x: Tensor) -> bool:
    """Whether the op runs its Triton path: the tensor is on a GPU, or launches are being recorded."""
    return x.is_cuda or _recorded is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    """Start `kernel` on `grid`; run-time arguments are positional, constexprs and num_warps/num_stages by
    name. Returns what Triton compiled, or None where nothing ran."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
    elif all(grid):  # an empty tensor has nothing to compute and CUDA refuses an empty grid
        return kernel[grid](*args, **meta)
    return None


class Repeated:
    """A kernel start that comes again with tensors of the same dtypes, shapes, strides and alignments.

    Triton binds and specialises all arguments at each start, 9 to 13 µs for twenty of them. From the second
    start on this hands them to the compiled kernel directly.
    scratch: the kernel makes tensor descriptors, which live in memory that Triton asks an allocator for.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], scratch: bool = False, **meta: Any) -> None:
        self._kernel, self._grid, self._scratch, self._meta = kernel, (*grid, 1, 1)[:3], scratch, meta
        self._constants: tuple[Any, ...] = ()
        self._run: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> None:
        if self._scratch and _recorded is None:
            # Triton's allocator is a context variable, unset in the thread of autograd; the user's own stays.
            contextvars.copy_context().run(self._start_with_scratch, args)
        else:
            self._start(args)

    def _start_with_scratch(self, args: tuple[Any, ...]) -> None:
        triton.set_allocator(_allocate)
        self._start(args)

    def _start(self, args: tuple[Any, ...]) -> None:
        if self._run is not None and _recorded is None:
            self._run(*args, *self._constants)
            return
        compiled = launch(self._kernel, self._grid, *args, **self._meta)
        if hasattr(compiled, "packed_metadata"):
            names = self._kernel.arg_names[len(args) :]
            self._constants = tuple(self._meta[name] for name in names)
            self._run = compiled[self._grid]


MOST_PLANS = 4096  # then all are dropped: shapes that never come again must not fill the memory


class Plans:
    """What is settled once for each kind of call: the host's time counts as well."""

    def __init__(self) -> None:
        self.held: dict[tuple[Any, ...], Any] = {}

    def __call__(self, key: tuple[Any, ...], settle: Callable[[], T]) -> T:
        """What `settle` returned for an equal key; while recording it is asked each time."""
        if _recorded is not None:
            return settle()
        found = self.held.get(key)
        if found is None:
            if len(self.held) >= MOST_PLANS:
                self.held.clear()
            found = self.held[key] = settle()
        return found


def kind_of(x: Tensor | None) -> tuple[Any, ...] | None:
    """What Triton specialises a pointer on, and its strides; nothing where fake tensors are recorded."""
    if x is None or _recorded is not None:
        return None
    return x.dtype, x.stride(), x.data_ptr() & 15


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@contextmanager
def record(target: str = "sm_90") -> Iterator[list[Launch]]:
    """Collect the launches that `target` would make instead of making them. Use under FakeTensorMode."""
    global _recorded, _target
    previous, _recorded, _target = (_recorded, _target), [], target
    try:
        yield _recorded
    finally:
        _recorded, _target = previous
