"""The call that stands for a match: its arguments, its values on fake tensors, and whether they fit.

A result fits where dtype and shape are those of what it replaces, and strides too where something sees them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from fusekit.kernels.op import Op
from fusekit.passes.normalise import is_mutation, is_view, same_meta, same_shape
from fusekit.passes.pattern import SEED, Match, New
from fusekit.passes.spelling import value_of


def insertion_point(match: Match) -> fx.Node:
    """In front of the first reader of any output, at the latest where the first output was."""
    inside = set(match.nodes)
    readers = [user for output in match.outputs for user in output.users if user not in inside]
    return min([match.root, *readers])


def operands(arguments: dict[Any, Any]) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    for value in arguments.values():
        if isinstance(value, New):
            nodes += operands(dict(enumerate(value.args)))
        elif isinstance(value, list):
            nodes += operands(dict(enumerate(value)))
        else:
            fx.node.map_arg(value, nodes.append)
    return nodes


def in_order(op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
    return {a.name: arguments.get(a.name, a.default_value) for a in op.fused._schema.arguments}


def value_in(argument: Any, near: fx.Node) -> Any:
    """The fake value an argument will have once it is a node."""
    if isinstance(argument, New):
        return run_fake(argument.target, argument.args, near)
    if argument is SEED:
        with value_of(near).fake_mode:
            return torch.empty(1, dtype=torch.int64, device=value_of(near).device)
    return value_of(argument)


def run_fake(target: Any, arguments: Any, near: fx.Node) -> Any:
    given = [_faked(argument, near) for argument in arguments]
    with value_of(near).fake_mode, enable_python_dispatcher():
        return target(*given)


def _faked(argument: Any, near: fx.Node) -> Any:
    if isinstance(argument, New):
        return run_fake(*argument, near)
    if isinstance(argument, list):
        return [_faked(inner, near) for inner in argument]
    return fx.node.map_arg(argument, value_of)


def as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def differs(match: Match, results: Any) -> str | None:
    for output, result in zip(match.outputs, as_tuple(results), strict=False):
        old = value_of(output)
        if not same_meta(old, result):
            return f"it returns {_kind(old)}, the op {_kind(result)}"
        moved = not same_shape(old.stride(), result.stride())
        if moved and layout_shows(output) and not old.is_contiguous():
            return f"strides {tuple(old.stride())} are seen outside, the op's are {tuple(result.stride())}"
    return None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"


def layout_shows(node: fx.Node) -> bool:
    """Whether the strides reach a graph output or an op that reads or writes memory directly.

    A write counts: whether the reshape it goes through is a view or a copy hangs on the strides.
    """
    for user in node.users:
        if user.op == "output" or user.target in _READ_MEMORY or is_mutation(user):
            return True
        if is_view(user) and layout_shows(user):
            return True
    return False


_READ_MEMORY = {
    torch.ops.aten.as_strided.default,
    torch.ops.aten.view.dtype,
    torch.ops.aten.view_as_complex.default,
}
