"""The one place where a Triton kernel is started, or recorded instead.

Recording serves the static lane: with `record()` on, ops run on fake tensors exactly as on a GPU, and every
launch they would have made is collected, so what is compiled ahead of time is what ships.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

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
_watchers: dict[int, Callable[[Any, tuple[Any, ...]], None]] = {}  # by thread: who is told of each start
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
        compiled = kernel[grid](*args, **meta)
        if _watchers:
            _report(Start.of(compiled, kernel, grid, args, meta), args)
        return compiled
    return None


class Start(NamedTuple):
    """A compiled kernel as Triton's launcher takes it, past Triton's binder and runner.

    compiled: Triton's kernel, which must live as long as its function may be called.
    constants: the constexprs, which the launcher is handed behind the run-time arguments and skips.
    scratch: the kernel makes tensor descriptors, which live in memory that Triton asks an allocator for.
    """

    compiled: Any
    run: Callable[..., Any]
    grid: tuple[int, ...]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    scratch: bool

    @classmethod
    def of(
        cls, compiled: Any, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]
    ) -> Start | None:
        """None where the kernel ran by other means than Triton's launcher: the sanitizer's."""
        names = kernel.arg_names[len(args) :]
        if not hasattr(compiled, "packed_metadata") or not meta.keys() >= set(names):
            return None
        constants = tuple(meta[name] for name in names)
        scratch = getattr(getattr(compiled, "metadata", None), "global_scratch_size", 0) > 0
        handles = compiled.run, (*grid, 1, 1)[:3], compiled.function, compiled.packed_metadata
        return cls(compiled, *handles, constants, scratch)

    def __call__(self, stream: int, args: Iterable[Any]) -> None:
        """args: the run-time arguments; an address does for a tensor."""
        # Nobody listens: no metadata for it, and no hooks, empty as Triton's chains of them are.
        run, handles = self.runner, (stream, self.function, self.metadata, None, None, None)
        run(*self.grid, *handles, *args, *self.constants)

    @property
    def runner(self) -> Callable[..., Any]:
        return partial(_with_scratch, self.run) if self.scratch else self.run


def _with_scratch(run: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Triton's allocator is a context variable, unset in the thread of autograd; the user's own stays."""
    return contextvars.copy_context().run(_allocating, run, args, kwargs)


def _allocating(run: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    triton.set_allocator(_allocate)
    return run(*args, **kwargs)


def current() -> tuple[int, int]:
    """The device on which kernels start, and its stream."""
    active = triton.runtime.driver.active
    device = active.get_current_device()
    return device, active.get_current_stream(device)


def observed() -> bool:
    """Whether starts must go the long way: they are recorded, watched, or hooked (a profiler of Triton's)."""
    if _recorded is not None or _watchers:
        return True
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


class Repeated:
    """A kernel start that comes again with tensors of the same dtypes, shapes, strides and alignments.

    Triton binds and specialises all arguments at each start, 9 to 13 µs for twenty of them, and its runner
    makes metadata for hooks that nobody has set, another 5. From the second start on a device on this hands
    the arguments to the compiled kernel's launcher.
    scratch: the kernel makes tensor descriptors.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], scratch: bool = False, **meta: Any) -> None:
        self._kernel, self._grid, self._scratch, self._meta = kernel, (*grid, 1, 1)[:3], scratch, meta
        self._starts: dict[int, Start] = {}

    def __call__(self, *args: Any) -> None:
        if not self._starts or observed():
            self._first(args)
            return
        device, stream = current()
        start = self._starts.get(device)
        if start is None:
            self._first(args)
        else:
            start(stream, args)

    def _first(self, args: tuple[Any, ...]) -> None:
        start = partial(_with_scratch, launch) if self._scratch and _recorded is None else launch
        compiled = start(self._kernel, self._grid, *args, **self._meta)
        ready = Start.of(compiled, self._kernel, self._grid, args, self._meta)
        if ready is not None:
            self._starts[current()[0]] = ready


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


@contextmanager
def watch(told: Callable[[Start | None, tuple[Any, ...]], None]) -> Iterator[None]:
    """Tell of every start on this thread, with its run-time arguments."""
    thread = threading.get_ident()
    before = _watchers.get(thread)
    _watchers[thread] = told
    try:
        yield
    finally:
        del _watchers[thread]
        if before is not None:
            _watchers[thread] = before


def _report(start: Start | None, args: tuple[Any, ...]) -> None:
    told = _watchers.get(threading.get_ident())
    if told is not None:
        told(start, args)


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
