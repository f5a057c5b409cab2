"""What an op does on a GPU, kept on a tape: from the third call of a kind on the host repeats it, no more.

On a GPU an op is Python that looks at dtypes, shapes, strides and alignments, allocates, makes views, and
starts kernels. For calls that are alike in all of these it does the same each time, so it is watched once and
then played: allocate, fill in addresses, start. A kind of call is everything that the op, its plans and
Triton's specialisation could see: of every tensor dtype, shape, strides, alignment and device, all other
arguments, and what the op says it depends on besides.

Only what is understood completely is played. An op that computes with PyTorch's operators, copies an operand,
calls a library or waits for a value is run as it is written, each time, and so is every call of tensors that
are not plain. Inputs are told apart by their place, not by what they are: two that were the same tensor when
the op was watched may be two when it is played.

The first call of a kind is only noted: sizes that never come again are not worth a tape.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from fusekit.kernels import launch
from fusekit.kernels.launch import Start

MOST_TAPES = 4096  # of an op; then all are dropped
_PLAIN = (Tensor, Parameter)
_VALUES = (int, float, bool, str, torch.dtype, type(None))
_ALLOCATING = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
               "aten::new_empty_strided")  # fmt: skip
_VIEWS_THAT_SAY_OTHERWISE = ("aten::_unsafe_view", "aten::_reshape_alias")


def _allocator(device: torch.device) -> Callable[[Any, Any, torch.dtype], Tensor]:
    """What makes an uninitialised tensor on the current device of this type; the quick one where there is."""
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if quick is not None:
        return quick  # type: ignore[no-any-return]
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


class Buffer(NamedTuple):
    """A tensor that the op allocates, in the place `slot`, and the step in front of which it does."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    step: int


class Step(NamedTuple):
    """One kernel start. args: the run-time arguments, of which `addresses` (place, slot, offset) are filled
    in; buffers: made in front of it; released: slots that it is the last to use."""

    start: Start
    args: tuple[Any, ...]
    addresses: tuple[tuple[int, int, int], ...]
    buffers: tuple[Buffer, ...]
    released: tuple[int, ...]


class Result(NamedTuple):
    """A tensor that the op returns: what is in `slot`, or, with `view`, that view (size, stride, offset)."""

    slot: int
    view: tuple[Any, ...] | None


class Tape(NamedTuple):
    """play: play(addresses of the call's tensors, stream) does it and returns the results. device: on which
    the kernels were compiled, and may be started. source: of play, to read."""

    play: Callable[[list[int], int], Any]
    device: int
    source: str


# What is returned: a tensor (None), or a list or tuple of tensors (None) and of lists of so many.
Shape = tuple[type, tuple[int | None, ...]] | None


def _compiled(
    steps: tuple[Step, ...], inputs: int, results: list[Result], shape: Shape, last: tuple[Buffer, ...],
    device: torch.device,
) -> Tape:  # fmt: skip
    """The tape as one straight function: a loop over steps and places takes the host as long again."""
    names: dict[str, Any] = {"allocate": _allocator(device)}
    lines = ["def play(addresses, stream):"]

    def constant(value: Any) -> str:
        if type(value) in (int, bool, str, type(None)):
            return repr(value)
        names[name := f"c{len(names)}"] = value
        return name

    def make(buffer: Buffer) -> None:
        made = f"t{buffer.slot} = allocate({buffer.size}, {buffer.stride}, {constant(buffer.dtype)})"
        lines.append(f"    {made}")

    def address(slot: int, offset: int) -> str:
        base = f"addresses[{slot}]" if slot < inputs else f"p{slot}"
        return f"{base} + {offset}" if offset else base

    for step in steps:
        for buffer in step.buffers:
            make(buffer)
            lines.append(f"    p{buffer.slot} = t{buffer.slot}.data_ptr()")
        args = [constant(value) for value in step.args]
        for place, slot, offset in step.addresses:
            args[place] = address(slot, offset)
        args += [constant(value) for value in step.start.constants]
        start = step.start
        grid, handles = ", ".join(map(str, start.grid)), map(constant, (start.function, start.metadata))
        head = f"{constant(start.runner)}({grid}, stream, {', '.join(handles)}, None, None, None"
        lines.append(f"    {', '.join([head, *args])})")
        lines += [f"    t{slot} = None" for slot in step.released]
    for buffer in last:
        make(buffer)
    found = [f"t{r.slot}" if r.view is None else f"t{r.slot}.as_strided{r.view}" for r in results]
    lines.append(f"    return {_shaped(found, shape)}")
    source = "\n".join(lines)
    exec(source, names)
    return Tape(names["play"], launch.current()[0], source)


def _shaped(found: list[str], shape: Shape) -> str:
    if shape is None:
        return found[0]
    outer, lengths = shape
    rest = iter(found)
    items = [
        next(rest) if length is None else "[" + ", ".join(next(rest) for _ in range(length)) + "]"
        for length in lengths
    ]
    return f"[{', '.join(items)}]" if outer is list else f"({', '.join(items)},)"


def _flat(returned: Any) -> tuple[list[Any], Shape]:
    if isinstance(returned, Tensor):
        return [returned], None
    tensors: list[Any] = []
    lengths: list[int | None] = []
    for item in returned:
        nested = isinstance(item, list | tuple)
        tensors.extend(item if nested else [item])
        lengths.append(len(item) if nested else None)
    return tensors, (list if isinstance(returned, list) else tuple, tuple(lengths))


class _Watch(TorchDispatchMode):
    """Follows the tensors of one call. Each has a slot, its input's or its allocation's, and an offset."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.obstacle = ""  # why this call can not be played
        self.alive = list(inputs)  # so that no two tensors share an id
        self.places = {id(x): (slot, 0) for slot, x in enumerate(inputs)}
        self.bases = [x.data_ptr() for x in inputs]
        self.inputs = len(inputs)
        self.buffers: list[Buffer] = []
        self.starts: list[tuple[Start, tuple[Any, ...], tuple[tuple[int, int, int], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _ALLOCATING:
            self._allocated(returned)
        elif (func.is_view or name in _VIEWS_THAT_SAY_OTHERWISE) and id(args[0]) in self.places:
            for view in returned if isinstance(returned, list | tuple) else [returned]:
                self._viewed(view, args[0])
        else:
            self.obstacle = self.obstacle or name
        return returned

    def _allocated(self, made: Tensor) -> None:
        slot = self.inputs + len(self.buffers)
        self.buffers.append(Buffer(slot, tuple(made.shape), made.stride(), made.dtype, len(self.starts)))
        self.bases.append(made.data_ptr())
        self.places[id(made)] = slot, 0
        self.alive.append(made)

    def _viewed(self, view: Tensor, base: Tensor) -> None:
        slot, _ = self.places[id(base)]
        self.places[id(view)] = slot, view.data_ptr() - self.bases[slot]
        self.alive.append(view)

    def started(self, start: Start | None, args: tuple[Any, ...]) -> None:
        if start is None:
            self.obstacle = self.obstacle or "a kernel that Triton's launcher did not start"
            return
        template, addresses = list(args), []
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                if not value.numel():
                    template[place] = 0  # the address of an empty tensor
                    continue
                if id(value) not in self.places:
                    self.obstacle = self.obstacle or "a tensor from elsewhere"
                    return
                addresses.append((place, *self.places[id(value)]))
                template[place] = None
        self.starts.append((start, tuple(template), tuple(addresses)))

    def tape(self, returned: Any) -> Tape | None:
        """None where the call can not be played."""
        tensors, shape = _flat(returned)
        found = [self.places.get(id(x)) if isinstance(x, Tensor) else None for x in tensors]
        if self.obstacle or any(place is None or place[0] < self.inputs for place in found):
            return None
        slots = [place[0] for place in found if place is not None]
        buffers = {b.slot: b for b in self.buffers}
        results = []
        for x, slot in zip(tensors, slots, strict=True):
            buffer = buffers[slot]
            whole = x.storage_offset() == 0 and slots.count(slot) == 1 and x.dtype == buffer.dtype
            if whole and x.untyped_storage().nbytes() == _bytes(x):
                buffers[slot] = buffer._replace(size=tuple(x.shape), stride=x.stride())
                results.append(Result(slot, None))
            elif x.dtype == buffer.dtype:
                results.append(Result(slot, (tuple(x.shape), x.stride(), x.storage_offset())))
            else:
                return None
        steps = self._steps(buffers, set(slots))
        last = tuple(b for b in buffers.values() if b.slot in slots and b.step >= len(steps))
        return _compiled(steps, self.inputs, results, shape, last, tensors[0].device)

    def _steps(self, buffers: dict[int, Buffer], returned: set[int]) -> tuple[Step, ...]:
        """Buffers are made where the op made them and let go behind their last use; unused ones never are."""
        last_use = {slot: i for i, (_, _, places) in enumerate(self.starts) for _, slot, _ in places}
        steps = []
        for i, (start, args, places) in enumerate(self.starts):
            here = [b for b in buffers.values() if b.step == i and (b.slot in last_use or b.slot in returned)]
            over = [s for s, last in last_use.items() if last == i and s >= self.inputs and s not in returned]
            steps.append(Step(start, args, places, tuple(here), tuple(over)))
        return tuple(steps)


def _bytes(x: Tensor) -> int:
    """From x's first element to the one behind its last."""
    if not x.numel():
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (reach + 1) * x.element_size()


def is_quiet() -> bool:
    """Whether nobody traces, transforms or watches what PyTorch runs on this thread."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def _describe(args: Any, key: list[Any], addresses: list[int]) -> bool:
    """Append what tells this call's kind, and its tensors' addresses; False where a tensor is not plain."""
    for x in args:
        kind = x.__class__
        if kind is Tensor or kind is Parameter:
            address = x.data_ptr()
            if x.is_neg() or not (address or x.numel() == 0):
                return False  # a negation, or zeros, that nobody has made yet
            addresses.append(address)
            key += (x.dtype, x.shape, x.stride(), address & 15, x.get_device())
        elif kind in _VALUES:
            key.append(x)
        elif kind is list or kind is tuple:
            key.append(len(x))
            if not _describe(x, key, addresses):
                return False
        else:
            return False
    return True


def _first_tensor(args: Any) -> Tensor | None:
    for x in args:
        if isinstance(x, Tensor):
            return x
        if isinstance(x, list | tuple) and (found := _first_tensor(x)) is not None:
            return found
    return None


def _apart(args: Any, tensors: list[Tensor]) -> list[Any]:
    """The same arguments, each tensor an object of its own, all of which go to `tensors`."""
    found: list[Any] = []
    for x in args:
        if isinstance(x, list | tuple):
            x = _apart(x, tensors)
        elif isinstance(x, Tensor):
            x = x.detach()
            tensors.append(x)
        found.append(x)
    return found


class Taped:
    """An op's function and its tapes.

    depends: what else decides what the function does, asked of its arguments at each call.
    """

    def __init__(self, run: Callable[..., Any], depends: Callable[..., Hashable] | None = None) -> None:
        self.run, self.depends = run, depends
        self.tapes: dict[tuple[Any, ...], Tape] = {}
        self.noted: dict[tuple[Any, ...], str] = {}  # kinds that came, and why they can not be played
        _every.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Play the call or run it, and watch it where it comes for the second time."""
        first = _first_tensor(args)
        if first is None or not launch.on_gpu(first):
            return self.run(*args, **kwargs)
        if torch.cuda.device_count() > 1 and torch.cuda.current_device() != first.get_device():
            with torch.cuda.device(first.device):
                return self._call(args, kwargs)
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or launch.observed() or not is_quiet():
            return self.run(*args, **kwargs)
        key, addresses = self._kind(args)
        if key is None:
            return self.run(*args)
        tape = self.tapes.get(key)
        if tape is not None:
            return tape.play(addresses, launch.current()[1])
        return self._watched(key, args) if self._comes_again(key) else self.run(*args)

    def played(self, args: tuple[Any, ...]) -> Any:
        """The results from a tape, or None where there is none for this call."""
        if launch.observed() or not is_quiet():
            return None
        key, addresses = self._kind(args)
        tape = None if key is None else self.tapes.get(key)
        if tape is None:
            return None
        device, stream = launch.current()
        return tape.play(addresses, stream) if device == tape.device else None

    def _kind(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...] | None, list[int]]:
        key: list[Any] = [None if self.depends is None else self.depends(*args)]
        addresses: list[int] = []
        return (tuple(key) if _describe(args, key, addresses) else None), addresses

    def _comes_again(self, key: tuple[Any, ...]) -> bool:
        """Whether to watch: the kind came before, and nothing stood in the way when it was watched."""
        obstacle = self.noted.get(key)
        if obstacle is None:
            if len(self.noted) >= MOST_TAPES:
                self.forget()
            self.noted[key] = ""
        return obstacle == ""

    def _watched(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        tensors: list[Tensor] = []
        apart = _apart(args, tensors)
        watch = _Watch(tensors)
        with launch.watch(watch.started), watch:
            returned = self.run(*apart)
        tape = watch.tape(returned)
        if tape is None:
            self.noted[key] = watch.obstacle or "what it returns"
        else:
            self.tapes[key] = tape
        return returned

    def forget(self) -> None:
        self.tapes.clear()
        self.noted.clear()


_every: list[Taped] = []


def forget() -> None:
    """Drop all tapes: what ops choose by has changed, as by a measurement."""
    for taped in _every:
        taped.forget()
