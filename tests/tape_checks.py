"""What tests of tapes share: a machine whose kernels do nothing, and a log of what an op does on it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusekit.kernels import config_table, launch, library, tape, tape_watch, tape_writer


class Log(TorchDispatchMode):
    """Kernel starts, and PyTorch's operators that compute, in order; tensors are told by where they lie.

    Nothing that is met dies while this logs, so an address says which memory it is in.
    """

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.entries: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.alive: list[Tensor] = tape_watch.tensors_in(args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.alive += tape_watch.tensors_in([args, kwargs])
        name = func._schema.name
        views = func.is_view or name in tape_watch.VIEWS_BY_ANOTHER_SCHEMA
        if name.startswith("aten::") and name not in tape_watch.ALLOCATING and not views:
            self.entries.append((name, self.where([args, kwargs])))
        returned = func(*args, **kwargs)
        self.alive += tape_watch.tensors_in([returned])
        return returned

    def started(self, name: str, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        pointers = (x.data_ptr() if isinstance(x, Tensor) else x for x in args)
        self.entries.append((name, grid, [self.memory(x) if type(x) is int else x for x in pointers]))

    def where(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            place = self.memory(x.data_ptr()) if x.numel() else None
            return x.dtype, tuple(x.shape), x.stride(), place
        if isinstance(x, list | tuple):
            return [self.where(item) for item in x]
        return {name: self.where(value) for name, value in x.items()} if isinstance(x, dict) else x

    def memory(self, address: int) -> Any:
        """(number of the memory, in the order in which it was met; bytes from its start); or no address."""
        for x in self.alive:
            storage = x.untyped_storage()
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                number = self.numbers.setdefault(storage.data_ptr(), len(self.numbers))
                return number, address - storage.data_ptr()
        return address


class Compiled:
    """Stands for what Triton compiled."""

    packed_metadata = ()
    metadata = SimpleNamespace(global_scratch_size=0)

    def __init__(self, machine: Machine, kernel: Any) -> None:
        self.machine, self.function = machine, kernel.__name__

    def run(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        self.machine.tell(function, (x, y, z), rest[4:])


class Machine:
    """Counts kernel starts, those of them through Triton's binder, and tells `log` of them."""

    def __init__(self) -> None:
        self.log: Log | None = None
        self.starts = self.bound = 0

    def tell(self, name: str, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        self.starts += 1
        if self.log is not None:
            self.log.started(name, grid, args)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Compiled | None:
        if not all(grid):
            return None
        self.bound += 1
        compiled = Compiled(self, kernel)
        constants = tuple(meta[name] for name in kernel.arg_names[len(args) :])
        self.tell(kernel.__name__, (*grid, 1, 1)[:3], (*args, *constants))
        if launch._watchers:
            launch._report(launch.Start.of(compiled, kernel, grid, args, meta), args)
        return compiled

    def allocate(self, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        made = torch._C._dynamo.guards._empty_strided_cpu(size, stride, dtype)
        if self.log is not None:
            self.log.alive.append(made)
        return made

    @contextlib.contextmanager
    def logging(self, args: Any, played: bool) -> Iterator[Log]:
        """All that ops do, though this is listening: from their tapes, or as they are written."""
        with pytest.MonkeyPatch.context() as patch, Log(args) as self.log:
            patch.setattr(tape, "is_quiet", lambda: True)
            if not played:
                patch.setattr(library.Inner, "__call__", lambda inner, *given: inner.taped.run(*given))
            yield self.log
        self.log = None


@contextlib.contextmanager
def a_gpu() -> Iterator[Machine]:
    """Ops take their GPU path on CPU tensors, with the table of sm_90, and no kernel does anything."""
    machine, table = Machine(), config_table.load("sm_90")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("fusekit.kernels") and hasattr(module, "on_gpu"):
                patch.setattr(module, "on_gpu", lambda x: True)
            if name.startswith("fusekit.kernels") and callable(getattr(module, "launch", None)):
                patch.setattr(module, "launch", machine.launch)
            if name.startswith("fusekit.kernels"):  # what was compiled on another machine
                for plans in (x for x in vars(module).values() if isinstance(x, launch.Plans)):
                    patch.setattr(plans, "held", {})
        patch.setattr(config_table, "for_device", lambda index: table)
        patch.setattr(launch, "current", lambda: (0, 0))
        patch.setattr(tape_writer, "_allocator", lambda device: machine.allocate)
        patch.setattr(tape, "same_bits", lambda results, others: True)  # of memory that no kernel wrote
        for taped in tape._every:
            patch.setattr(taped, "patience", 1)
        tape.forget()
        yield machine
    tape.forget()


@contextlib.contextmanager
def a_taped(*args: Any, **kwargs: Any) -> Iterator[tape.Taped]:
    """A function of a test's own, for its time among those that have tapes."""
    taped = tape.Taped(*args, **kwargs)
    try:
        yield taped
    finally:
        tape._every.remove(taped)


M, K, N = 32, 64, 48


def fresh(x: Any) -> Any:
    """A copy in memory of its own, laid out and aligned alike."""
    if not isinstance(x, Tensor):
        return [fresh(item) for item in x] if isinstance(x, list) else x
    memory = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    memory.untyped_storage().copy_(x.untyped_storage())
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_(x.requires_grad)


def results_of(op: Any, args: Any) -> list[Tensor]:
    """Results and gradients of one call."""
    returned = op.fused(*args)
    results = list(returned) if isinstance(returned, tuple) else [returned]
    wanted = [y for y in results if y.requires_grad]
    if wanted:
        inputs = [x for x in tape_watch.tensors_in(args) if x.requires_grad]
        grads = torch.autograd.grad(wanted, inputs, [torch.ones_like(y) for y in wanted], allow_unused=True)
        results += [g for g in grads if g is not None]
    return results


def does(machine: Machine, op: Any, args: Any, played: bool) -> Any:
    """What a call does, and how its results lie."""
    with machine.logging(args, played) as log:
        results = results_of(op, args)
        log.alive += results
        return log.entries, [log.where(x) for x in results]


def tapes() -> int:
    return sum(len(taped.tapes) for taped in tape._every)


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)


def shifted(x: Tensor) -> Tensor:
    """The same numbers, one element behind where 16 bytes load at once."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
