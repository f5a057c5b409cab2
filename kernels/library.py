"""Registration of ops under torch.ops.fusekit.

`Library.define` + `impl` with a hand-written autograd.Function at the Autograd key costs 10-14 µs a forward
call, against 16-18 for `torch.library.custom_op` (measured on a CPU, one thread).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.launch import recording
from fusekit.kernels.tape import Taped
from fusekit.kernels.tape_watch import without_autocast

LIBRARY = torch.library.Library("fusekit", "DEF")


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    autograd: Callable[..., Any] | None = None,
    autocast: str | None = None,
    autocast_keeps: tuple[str, ...] = (),
    tags: tuple[torch.Tag, ...] = (),
    check: Callable[..., Any] | None = None,
    depends: Callable[..., Hashable] | None = None,
    patience: int = 1,
) -> Any:
    """Register an op and return its overload, or of an inner one what calls it the shortest way.

    Args:
        schema: "name(Tensor x, ...) -> ..." without the namespace.
        run: computes; branches on `on_gpu(x)`. Registered for both the CPU and the CUDA key.
        fake: shapes, dtypes and strides only.
        autograd: called in place of `run` when autograd is on; applies the autograd.Function. None for the
            inner forward and backward ops, which nobody differentiates.
        autocast: what ambient autocast does to a direct call: "lower" casts floating tensors to the autocast
            dtype, "float32" casts them up, None leaves them.
        autocast_keeps: arguments that autocast leaves as they are.
        tags: torch.Tag values for the schema.
        check: of an inner op: raises where its arguments do not do; not asked of calls that are on tape.
        depends: of an inner op: what decides, besides its arguments, what it does on a GPU (tape.py).
        patience: of an inner op: calls of a kind before one is watched for a tape.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=tags)

    plainly = without_autocast(run)
    arguments = getattr(torch.ops.fusekit, name).default._schema.arguments
    writes = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    taped = None if autograd is not None else Taped(plainly, depends, name, writes, patience)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, taped or plainly, key)

    def fake_or_record(*args: Any, **kwargs: Any) -> Any:
        return (run if recording() else fake)(*args, **kwargs)

    torch.library.register_fake(f"fusekit::{name}", fake_or_record, lib=LIBRARY)
    overload = getattr(torch.ops.fusekit, name).default
    if autograd is not None:
        LIBRARY.impl(name, autograd, "Autograd")
    if autocast is not None:
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            kernel = _autocast_kernel(overload, device, key, autocast, autocast_keeps)
            LIBRARY.impl(name, kernel, key, with_keyset=True)
    return overload if taped is None else Inner(overload, taped, check)


class Inner:
    """An op that nobody differentiates: played from its tape where there is one, past PyTorch's dispatcher,
    which takes the host 5 µs; else the overload itself."""

    def __init__(self, overload: Any, taped: Taped, check: Callable[..., Any] | None) -> None:
        self.overload, self.taped, self.check = overload, taped, check

    def __call__(self, *args: Any) -> Any:
        if self.taped.tapes and (found := self.taped.played(args)) is not None:
            return found
        if self.check is not None:
            self.check(*args)
        return self.overload(*args)


def _autocast_kernel(
    overload: Any, device: str, key: str, policy: str, keeps: tuple[str, ...]
) -> Callable[..., Any]:
    names = [argument.name for argument in overload._schema.arguments]
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if policy == "float32" else torch.get_autocast_dtype(device)

        def cast(name: str, value: Any) -> Any:
            eligible = (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.dtype != torch.float64
                and name not in keeps
            )
            return value.to(dtype) if eligible else value

        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return overload(*map(cast, names, args), **{name: cast(name, v) for name, v in kwargs.items()})

    return kernel


class Function(torch.autograd.Function):
    """An autograd.Function applied past the Python in front of it, which serves functorch's transforms alone
    and takes the host 2 µs, and 5 with twenty arguments."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def refuse_double_backward(name: str) -> None:
    """Raise where somebody differentiates through a backward pass; call it first in every Function.backward.

    Gradients are on inside a backward pass only under create_graph=True. Asking whether the incoming ones
    need a gradient would miss gradient penalties, where what needs one is the saved input.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"fusekit: {name} has no second derivative. Leave it unfused where you need one: "
            f"fusekit.optimize(model, fuse=[...]) without {name!r}, or FUSEKIT_DISABLE={name}"
        )


def is_last_backward(grad: Tensor) -> bool:
    """Whether what this Function saved is freed right after, so that its memory may be written to.

    Not where the graph is kept for another backward pass, and not while somebody traces: a compiled backward
    pass does not know how it will be called. PyTorch's own donated buffers ask the same question.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and type(grad) is Tensor and not torch.compiler.is_compiling() and not keeps()


def saves_through_hooks() -> bool:
    """Whether somebody packs what is saved now, and may keep it: a checkpoint, an offloader, a recorder."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
