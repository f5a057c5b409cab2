"""Watches one call of an op's function: what it allocates, which kernels it starts, of what memory, and which
of PyTorch's operators it calls.

Slots number what tensors lie in: the call's own tensors first, then what was allocated or computed, in order.
A tensor is a slot and a view of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusekit.kernels.launch import Start

ALLOCATING = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
              "aten::new_empty_strided")  # fmt: skip
VIEWS_BY_ANOTHER_SCHEMA = ("aten::_unsafe_view", "aten::_reshape_alias")
# What such operators return depends on values, or they make another tensor of one that is there.
UNPLAYABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, also within autocast: a backward pass there would cast the float32 matmuls within an op."""

    def plainly(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return run(*args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return run(*args, **kwargs)

    return plainly


class Place(NamedTuple):
    """Where a tensor lies: bytes behind the first of what its slot holds."""

    slot: int
    offset: int


class Buffer(NamedTuple):
    """A tensor that the function allocated."""

    slot: int
    made: Tensor


class Started(NamedTuple):
    start: Start
    args: tuple[Any, ...]


class Called(NamedTuple):
    """An operator of PyTorch's. returned: what it made, new slots."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any


class Watch(TorchDispatchMode):
    """tensors: of the call, each an object of its own."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.obstacle = ""  # why this call can not be played
        self.slots: list[Tensor] = []  # what was first seen in each
        self.inputs = len(tensors)
        self.places: dict[int, Place] = {}
        self.alive: list[Tensor] = []  # so that no two tensors share an id
        self.steps: list[Buffer | Started | Called] = []
        for x in tensors:
            self._new_slot(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        name = func._schema.name
        if name in ALLOCATING:
            self.steps.append(Buffer(self._new_slot(returned), returned))
        elif (
            (func.is_view or name in VIEWS_BY_ANOTHER_SCHEMA)
            and id(args[0]) in self.places
            and _share_memory(returned, args[0])
        ):
            self._viewed(returned, args[0])
        elif name.startswith("aten::") and UNPLAYABLE.isdisjoint(func.tags):
            self._called(Called(func, args, kwargs, returned))
        else:
            self.obstacle = self.obstacle or name
        return returned

    def _new_slot(self, x: Tensor) -> int:
        self.places[id(x)] = Place(len(self.slots), 0)
        self.slots.append(x)
        return len(self.slots) - 1

    def _viewed(self, returned: Any, base: Tensor) -> None:
        slot = self.places[id(base)].slot
        for view in returned if isinstance(returned, list | tuple) else [returned]:
            begins = (view.storage_offset() * view.element_size(),
                      self.slots[slot].storage_offset() * self.slots[slot].element_size())  # fmt: skip
            self.places[id(view)] = Place(slot, begins[0] - begins[1])
            self.alive.append(view)
            if view.dtype != self.slots[slot].dtype and not self.slots[slot].is_contiguous():
                self.obstacle = self.obstacle or "other types of strided memory"

    def _called(self, call: Called) -> None:
        unknown = [x for x in tensors_in([call.args, call.kwargs]) if id(x) not in self.places]
        if unknown:
            self.obstacle = self.obstacle or f"{call.function._schema.name} of a tensor from elsewhere"
        self.steps.append(call)
        for x in tensors_in([call.returned]):
            if id(x) not in self.places:  # what is written to in place is returned as it was given
                self._new_slot(x)

    def started(self, start: Start | None, args: tuple[Any, ...]) -> None:
        if start is None:
            self.obstacle = self.obstacle or "a kernel that Triton's launcher did not start"
        elif any(isinstance(x, Tensor) and id(x) not in self.places and x.numel() for x in args):
            self.obstacle = self.obstacle or "a kernel's tensor from elsewhere"
        else:
            self.alive += [x for x in args if isinstance(x, Tensor)]
            self.steps.append(Started(start, args))


def _share_memory(returned: Any, base: Tensor) -> bool:
    """Whether all are views: in inference mode `contiguous` itself is seen, which is one or copies."""
    memory = base.untyped_storage().data_ptr()
    return all(x.untyped_storage().data_ptr() == memory for x in tensors_in([returned]))


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors of nested lists, tuples and dictionaries, in order."""
    found: list[Tensor] = []
    for x in values.values() if isinstance(values, dict) else values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple | dict):
            found += tensors_in(x)
    return found
