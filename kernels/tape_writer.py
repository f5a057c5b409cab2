"""Writes a watched call down as one straight line of code that does the same: it allocates, starts kernels
with addresses, and calls PyTorch's operators on views made anew. A loop over steps takes the host as long
again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels import launch
from fusekit.kernels.launch import Start
from fusekit.kernels.tape_watch import Buffer, Called, Started, Watch, tensors_in, without_autocast

CONSTANTS = (int, bool, str, type(None))  # that are written as they are; others get a name


class Tape(NamedTuple):
    """play: play(addresses of the call's tensors, stream, its arguments) does the call and returns the
    results. device: on which the kernels were compiled, and may be started. source: of play, to read."""

    play: Callable[[list[int], int, tuple[Any, ...]], Any]
    device: int
    source: str


def tape_of(watch: Watch, returned: Any) -> Tape | None:
    """None where the call can not be played: `watch.obstacle` says why."""
    found = tensors_in([returned])
    if any(id(x) not in watch.places or watch.places[id(x)].slot < watch.inputs for x in found):
        watch.obstacle = watch.obstacle or "what it returns was not made by it"
    if not watch.obstacle and _unwritten(watch, returned):
        watch.obstacle = "memory that nobody was seen to write"  # a kernel that PyTorch does not know of
    return None if watch.obstacle else _Writer(watch).write(returned)


def _unwritten(watch: Watch, returned: Any) -> bool:
    """Whether an operator reads, or the call returns, memory that no step before it may have written."""
    written = set(range(watch.inputs))
    buffers: set[int] = set()

    def slots(values: Any) -> set[int]:
        return {watch.places[id(x)].slot for x in tensors_in([values]) if x.numel() and id(x) in watch.places}

    for step in watch.steps:
        match step:
            case Buffer(slot, made):
                buffers |= {slot} if made.numel() else set()
            case Started(_, args):
                written |= slots(args)
            case Called(function, args, kwargs, made):
                if not function._schema.is_mutable and slots([args, kwargs]) & buffers - written:
                    return True
                written |= slots([args, kwargs]) | slots(made)
    return bool(slots(returned) & buffers - written)


class _Writer:
    """Writes `play` of what was watched."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.lines = watch, ["def play(addresses, stream, args):"]
        self.names: dict[str, Any] = {}
        self.known: dict[int, str] = {}  # names of constants by id

    def write(self, returned: Any) -> Tape:
        watch = self.watch
        allocate = self.constant(_allocator(watch.slots[0].device))
        whole = self._whole(returned)
        last = self._last_uses(returned)
        for number, step in enumerate(watch.steps):
            match step:
                case Buffer(slot, made):
                    if slot not in last:
                        continue  # an allocation that nobody uses
                    shown = whole.get(slot, made)
                    size, stride = tuple(shown.shape), shown.stride()
                    self.line(f"t{slot} = {allocate}({size}, {stride}, {self.constant(made.dtype)})")
                    self.line(f"p{slot} = t{slot}.data_ptr()")
                case Started(start, args):
                    self._start(start, args)
                case Called():
                    self._call(step, last)
            for slot in [s for s, end in last.items() if end == number and s >= watch.inputs]:
                self.line(f"t{slot} = None")
        self.line(f"return {self.value(returned, whole)}")
        if any("tensors[" in line for line in self.lines):
            self.lines.insert(1, f"    tensors = {self.constant(tensors_in)}(args)")
        source = "\n".join(self.lines)
        exec(source, self.names)
        calls = any(isinstance(step, Called) for step in watch.steps)
        play = without_autocast(self.names["play"]) if calls else self.names["play"]
        return Tape(play, launch.current()[0], source)

    def _whole(self, returned: Any) -> dict[int, Tensor]:
        """Of buffers that are returned in full, once: how. They are allocated so, and need no view."""
        buffers = {step.slot: step.made for step in self.watch.steps if isinstance(step, Buffer)}
        found = tensors_in([returned])
        slots = [self.watch.places[id(x)].slot for x in found]
        called = {id(x) for s in self.watch.steps if isinstance(s, Called) for x in self._read(s)}
        named = {self.watch.places[i].slot for i in called if i in self.watch.places}
        return {
            slot: x
            for slot, x in zip(slots, found, strict=True)
            if slot in buffers and slots.count(slot) == 1 and slot not in named
            and x.dtype == buffers[slot].dtype and x.storage_offset() == 0
            and _reach(x) == buffers[slot].untyped_storage().nbytes()
        }  # fmt: skip

    def _read(self, step: Buffer | Started | Called) -> list[Tensor]:
        match step:
            case Started(_, args):
                return [x for x in args if isinstance(x, Tensor) and x.numel()]
            case Called(_, args, kwargs, _):
                return tensors_in([args, kwargs])
            case _:
                return []

    def _last_uses(self, returned: Any) -> dict[int, int]:
        """The step behind which a slot can be let go; of what is returned one that never comes."""
        places, steps = self.watch.places, self.watch.steps
        last = {places[id(x)].slot: n for n, step in enumerate(steps) for x in self._read(step)}
        return last | {places[id(x)].slot: len(steps) for x in tensors_in([returned])}

    def _start(self, start: Start, args: tuple[Any, ...]) -> None:
        self.constant(start.compiled)  # which must live as long as its function may be called
        handles = [*map(str, start.grid), "stream", self.constant(start.function),
                   self.constant(start.metadata), "None", "None", "None"]  # fmt: skip
        given = [self.address(x) if isinstance(x, Tensor) else self.constant(x) for x in args]
        constants = [self.constant(x) for x in start.constants]
        self.line(f"{self.constant(start.runner)}({', '.join([*handles, *given, *constants])})")

    def _call(self, call: Called, last: dict[int, int]) -> None:
        args = [self.value(x) for x in call.args]
        args += [f"{name}={self.value(x)}" for name, x in call.kwargs.items()]
        text = f"{self.constant(call.function)}({', '.join(args)})"
        read = {id(x) for x in self._read(call)}
        several = isinstance(call.returned, list | tuple)
        self.line(f"made = {text}")
        for number, x in enumerate(call.returned if several else [call.returned]):
            slot = self.watch.places[id(x)].slot if isinstance(x, Tensor) and id(x) not in read else None
            if slot in last:
                self.line(f"t{slot} = made{f'[{number}]' if several else ''}")
                self.line(f"p{slot} = t{slot}.data_ptr()")
        self.line("made = None")

    def line(self, text: str) -> None:
        self.lines.append(f"    {text}")

    def constant(self, x: Any) -> str:
        if type(x) in CONSTANTS:
            return repr(x)
        if id(x) not in self.known:
            self.known[id(x)] = name = f"c{len(self.names)}"
            self.names[name] = x
        return self.known[id(x)]

    def address(self, x: Tensor) -> str:
        if not x.numel():
            return "0"  # which is what an empty tensor says
        slot, offset = self.watch.places[id(x)]
        base = f"addresses[{slot}]" if slot < self.watch.inputs else f"p{slot}"
        return f"{base} + {offset}" if offset else base

    def value(self, x: Any, whole: dict[int, Tensor] | None = None) -> str:
        """An expression for a tensor, a constant, or a list or tuple of either."""
        if isinstance(x, list):
            return f"[{', '.join(self.value(item, whole) for item in x)}]"
        if isinstance(x, tuple):
            return f"({', '.join(self.value(item, whole) for item in x)},)" if x else "()"
        return self.tensor(x, whole or {}) if isinstance(x, Tensor) else self.constant(x)

    def tensor(self, x: Tensor, whole: dict[int, Tensor]) -> str:
        slot, offset = self.watch.places[id(x)]
        held = self.watch.slots[slot]
        name = f"tensors[{slot}]" if slot < self.watch.inputs else f"t{slot}"
        if x is held or whole.get(slot) is x:
            return name
        if x.dtype != held.dtype:
            name = f"{name}.view({self.constant(x.dtype)})"  # of contiguous memory, or PyTorch refuses
        begin = f"{name}.storage_offset() + {offset // x.element_size()}"
        view = f"{name}.as_strided({tuple(x.shape)}, {x.stride()}, {begin})"
        if held.is_inference() or x.is_inference():
            return view
        return f"{view}.data" if held._version > x._version else view  # whose writes nobody counts


def _allocator(device: torch.device) -> Callable[[Any, Any, torch.dtype], Tensor]:
    """What makes an uninitialised tensor on the current device of this type; the quick one where there is."""
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if quick is not None:
        return quick  # type: ignore[no-any-return]
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


def _reach(x: Tensor) -> int:
    """Bytes from x's first element to the end of its last."""
    if not x.numel():
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (reach + 1) * x.element_size()
