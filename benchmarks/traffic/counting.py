"""Bytes and launches of whatever runs, and bytes saved for backward, on fake tensors: no GPU, no data.

The model, a lower bound: every kernel launch reads each of its inputs once and writes each of its outputs
once, and finds nothing in a cache that the launch before has left. An expanded dimension is there once, and
the same tensor given twice is read once. Views, metadata and uninitialised memory cost nothing. An ATen call
is one launch, those in LAUNCHES excepted; what the kernels of one call hand to each other is not counted,
which favours eager. A fusekit op is its Triton launches, recorded, and the ATen calls around them; which
argument a kernel loads and which it stores is read from its source. Tiles of a matrix product that are read
again are not counted, in either.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.traffic.pointers import named_arguments, roles
from fusekit.kernels.launch import Launch, record

aten = torch.ops.aten

# Calls that start several kernels on a GPU, as CUDA's implementations in PyTorch 2.11 to 2.13 do, at least.
LAUNCHES = {
    "native_layer_norm_backward": 2,  # the input's gradient; those of weight and bias
    "rms_norm_backward": 2,  # as layer norm's
    "nll_loss_backward": 2,  # zeros, then one element a row
    "nll_loss2d_backward": 2,
    "embedding_dense_backward": 2,  # zeros, then rows added
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,  # the GPU's: rows' sums, gradients, cast of dq
    "_scaled_dot_product_flash_attention_backward": 3,
    "slice_backward": 2,  # zeros, then the slice
    "select_backward": 2,
}
FREE = {"detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size", "device", "size",
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "stride", "item",
        "_local_scalar_dense", "sym_size", "sym_numel", "sym_stride", "numel"}  # fmt: skip
WRITE_ONLY = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like",
              "new_full", "fill_", "zero_", "arange", "scalar_tensor"}  # fmt: skip
# Of their first argument only as much is read as comes out.
GATHERS = {"embedding", "index_select", "gather", "index"}
LOSSES = {"nll_loss_forward": 1, "nll_loss2d_forward": 1}  # position of the targets: one score each is read


@dataclass
class Traffic:
    """Bytes moved and kernels started."""

    bytes: int = 0
    launches: int = 0

    def add(self, moved: int, launches: int = 1) -> None:
        self.bytes += moved
        self.launches += launches


@dataclass
class Counts:
    """Traffic by direction, and the bytes that autograd keeps from the forward for the backward pass."""

    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)
    saved_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def moved(counts: dict[str, Any]) -> int:
    """Bytes of both directions, of a `Counts` as it is in results files."""
    return int(counts["forward"]["bytes"] + counts["backward"]["bytes"])


def launches(counts: dict[str, Any]) -> int:
    """Kernels of both directions, of a `Counts` as it is in results files."""
    return int(counts["forward"]["launches"] + counts["backward"]["launches"])


class Counter(TorchDispatchMode):
    """Counts ATen calls and the kernel launches of fusekit's ops into `traffic`; used within `as_on_gpu`."""

    def __init__(self, traffic: Traffic, launches: list[Launch]) -> None:
        super().__init__()
        self.traffic, self.recorded = traffic, launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fusekit":
            return self._fused(func, args, kwargs)
        returned = func(*args, **kwargs)
        if not _is_free(func):
            self.traffic.add(call_bytes(func, args, kwargs, returned), _launches(func, args))
        return returned

    def _fused(self, func: Any, args: Any, kwargs: Any) -> Any:
        before = len(self.recorded)
        with self:  # the op's Python, so that the ATen calls within are seen as well
            returned = func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        started = self.recorded[before:]
        del self.recorded[before:]
        for start in started:
            if all(start.grid):
                self.traffic.add(launch_bytes(start))
        return returned


def launch_bytes(start: Launch) -> int:
    """What one launch of a Triton kernel reads and writes; a tensor that it leaves alone is nothing."""
    found = roles(start)
    tensors = {name: value for name, value in named_arguments(start).items() if isinstance(value, Tensor)}
    return sum(_distinct(tensors[name] for name in tensors if name in part) for part in found)


def call_bytes(func: Any, args: Any, kwargs: Any, returned: Any) -> int:
    """What one ATen call reads and writes."""
    name = func.overloadpacket.__name__
    outputs = _tensors(returned)
    written = _distinct(outputs)
    if name in WRITE_ONLY:
        return written
    inputs = _tensors((args, kwargs))
    if name in GATHERS:
        return _distinct(inputs[1:]) + 2 * written
    if name in LOSSES:
        targets = inputs[LOSSES[name]]
        return _distinct(inputs[1:]) + targets.numel() * inputs[0].element_size() + written
    if name in ("copy_", "_foreach_copy_"):  # what is overwritten is not read, and a list returns nothing
        return _distinct(_tensors(args[0])) + _distinct(_tensors(args[1:]))
    return _distinct(inputs) + written


def _is_free(func: Any) -> bool:
    """Views, metadata and memory without contents."""
    name = func.overloadpacket.__name__
    if func.namespace not in ("aten", "fusekit_traffic") or name in FREE:
        return True
    results = [r.alias_info for r in func._schema.returns]
    return bool(results) and all(alias is not None and not alias.is_write for alias in results)


def _launches(func: Any, args: Any) -> int:
    name = func.overloadpacket.__name__
    return sum(args[-1]) if name == "convolution_backward" else LAUNCHES.get(name, 1)


def tensor_bytes(t: Tensor) -> int:
    """Of memory that the tensor reaches: an expanded dimension is there once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * t.element_size()


def _distinct(tensors: Iterable[Tensor]) -> int:
    found = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype): tensor_bytes(t)
        for t in tensors
    }
    return sum(found.values())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def as_on_gpu() -> Iterator[list[Launch]]:
    """Run fake CPU tensors as if on a GPU: Triton paths are taken, their launches recorded."""
    with warnings.catch_warnings(), record() as launches:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield launches


@contextlib.contextmanager
def count_saved(counts: Counts, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Bytes of storages that autograd saves meanwhile, each once, those of `parameters` left out."""
    seen: dict[int, Any] = {p.untyped_storage()._cdata: p for p in parameters}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = saved  # kept alive, so that no later storage gets its address
            counts.saved_bytes += storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        yield
