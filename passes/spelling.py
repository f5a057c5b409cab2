"""One name and one argument list per meaning, read off a node without changing it.

`x ** 2`, `x.square()` and `x * x` are different ATen calls with one meaning; matcher and mask reader ask
`spell` and see ("pow", (x, 2)). The graph keeps what the user wrote, so a node no rule takes runs exactly as
before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

aten = torch.ops.aten


class Spelling(NamedTuple):
    """What a node computes: `name` over `args`, defaults filled in."""

    name: str
    args: tuple[Any, ...]


class Start(NamedTuple):
    """Where a slice begins, counted from the front; in a pattern a size, as those of shapes."""

    at: Any


def value_of(node: Any) -> Any:
    """The fake tensor (or SymInt) a node stands for; anything else is itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def spell(node: fx.Node) -> Spelling:
    """The canonical spelling of a call; placeholders and calls that are no ATen op spell as themselves."""
    if node.target is operator.getitem:
        return _part(node)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return Spelling(f"{node.op}:{node.target}", node.args)
    name = node.target._schema.name.removeprefix("aten::")
    args = filled(node)
    respell = _RESPELL.get(name)
    return respell(node, name, args) if respell else Spelling(name, args)


def said(node: fx.Node) -> str:
    """What a node is, for a reader who sees no graph; in the same words for every layer."""
    if node.op == "placeholder":
        return "a parameter" if node.meta.get("parameter") else "an input"
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem and spell(node).name.startswith("call_function"):
        return f"a part of what {said(node.args[0])} returns"  # type: ignore[arg-type]
    if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
        return str(getattr(node.target, "__name__", node.target)).removeprefix("call_")
    return spell(node).name


def _part(node: fx.Node) -> Spelling:
    """One of the tensors that chunk, split, unbind and max return: a slice, a row, the largest elements."""
    producer, index = node.args
    name, args = spell(producer) if isinstance(producer, fx.Node) else ("", ())
    parts: Any = value_of(producer)
    if name == "max" and len(args) == 3 and index == 0:
        return Spelling("amax", (args[0], [args[1]], args[2]))
    if name == "unbind":
        return Spelling("select", (args[0], args[1], index))
    if name not in ("chunk", "split", "split_with_sizes") or not isinstance(index, int):
        return Spelling(f"{node.op}:{node.target}", node.args)
    dim = args[2] % parts[0].dim() - parts[0].dim()
    start = sum(part.shape[dim] for part in parts[: index % len(parts)])
    return Spelling("slice", (args[0], dim, Start(start), 1))


def _slice(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    """Without its end, which shows in the shape."""
    source, dim, start, _, step = args
    size = value_of(source).shape[dim]
    if start is None:
        start = 0
    elif isinstance(start, int) and isinstance(size, int):
        start = min(max(start + size, 0) if start < 0 else start, size)
    return Spelling(name, (source, dim, Start(start), step))


def filled(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of an ATen call in the schema's order, defaults filled in."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(node.kwargs)
    values = list(node.args)
    for argument in arguments[len(values) :]:
        values.append(given.get(argument.name, argument.default_value))
    return tuple(values)


def _rank(value: Any) -> int:
    tensor = value_of(value)
    return tensor.dim() if isinstance(tensor, Tensor) else -1


def _add(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    if len(args) > 2 and args[2] != 1:
        return Spelling("add_scaled", args)
    return Spelling("add", args[:2])


def _mul(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    return Spelling("pow", (args[0], 2)) if args[0] is args[1] else Spelling("mul", args)


def _pow(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    return Spelling("rsqrt", args[:1]) if args[1] == -0.5 else Spelling("pow", args)


def _reciprocal(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    inner = spell(args[0])
    return (
        Spelling("rsqrt", inner.args)
        if inner.name == "sqrt" and len(args[0].users) == 1
        else Spelling(name, args)
    )


def _div(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    return Spelling("div", args[:2]) if len(args) < 3 or args[2] is None else Spelling("div_rounded", args)


def _transpose(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    rank = _rank(args[0])
    if name in ("mT", "adjoint") or (name in ("t", "numpy_T") and rank == 2):
        return Spelling("transpose_last", args[:1])
    if name in ("t", "numpy_T"):
        return Spelling(name, args)
    if name == "permute":
        order = [d % rank for d in args[1]]
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        return Spelling("transpose_last", args[:1]) if rank > 1 and order == swapped else Spelling(name, args)
    dims = sorted(d % rank - rank for d in args[1:3]) if rank > 0 else []
    return Spelling("transpose_last", args[:1]) if dims == [-2, -1] else Spelling(name, (args[0], *dims))


def _masked_fill(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    return Spelling("masked_fill", args[:3])


def _where(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    condition, kept, other = (*args, None, None)[:3]
    if isinstance(kept, (int, float)) and isinstance(other, fx.Node):
        return Spelling("masked_fill", (other, condition, kept))
    return Spelling("where", args)


def _compare(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    if name == "eq" and isinstance(args[1], (int, float)) and args[1] == 0:
        return Spelling("not", args[:1])
    return Spelling(name, args)


def _not(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    operand = value_of(args[0])
    boolean = isinstance(operand, Tensor) and operand.dtype == torch.bool
    return Spelling("not", args[:1]) if boolean or name == "logical_not" else Spelling(name, args)


def _layer_norm(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    x, shape, weight, bias, eps = args[:5]
    return Spelling(name, (x, len(shape), weight, bias, eps))


def _rms_norm(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    x, shape, weight, eps = args[:4]
    if eps is None:  # torch takes the epsilon of the dtype it computes in
        eps = torch.finfo(torch.promote_types(value_of(x).dtype, torch.float32)).eps
    return Spelling(name, (x, len(shape), weight, eps))


def _attention(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    return Spelling("sdpa", args[:7])  # enable_gqa shows in the shapes


def _glu(node: fx.Node, name: str, args: tuple[Any, ...]) -> Spelling:
    return Spelling(name, (args[0], args[1] % _rank(args[0]) - _rank(args[0])))


def _keep(count: int, renamed: str | None = None) -> Callable[..., Spelling]:
    """Keep the first `count` arguments: what the others say shows in meta["val"]."""
    return lambda node, name, args: Spelling(renamed or name, args[:count])


_RESPELL: dict[str, Callable[[fx.Node, str, tuple[Any, ...]], Spelling]] = {
    "add": _add,
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    "true_divide": _div,
    "square": lambda node, name, args: Spelling("pow", (args[0], 2)),
    "pow": _pow,
    "reciprocal": _reciprocal,
    "to": _keep(1),
    "_to_copy": _keep(1, "to"),
    "type_as": _keep(1, "to"),
    "t": _transpose,
    "numpy_T": _transpose,
    "mT": _transpose,
    "adjoint": _transpose,
    "permute": _transpose,
    "transpose": _transpose,
    "matmul": _keep(2),
    "mm": _keep(2, "matmul"),
    "bmm": _keep(2, "matmul"),
    "softmax": _keep(2),
    "_softmax": _keep(2, "softmax"),
    "mean": _keep(3),
    "reshape": _keep(1),
    "view": _keep(1, "reshape"),
    "flatten": _keep(1, "reshape"),
    "unflatten": _keep(1, "reshape"),
    "reshape_as": _keep(1, "reshape"),
    "glu": _glu,
    "slice": _slice,
    "expand": _keep(1),
    "expand_as": _keep(1, "expand"),
    "masked_fill": _masked_fill,
    "where": _where,
    "eq": _compare,
    "logical_not": _not,
    "bitwise_not": _not,
    "logical_and": _keep(2, "and"),
    "bitwise_and": _keep(2, "and"),
    "__and__": _keep(2, "and"),
    "logical_or": _keep(2, "or"),
    "bitwise_or": _keep(2, "or"),
    "__or__": _keep(2, "or"),
    "cross_entropy_loss": _keep(2),  # the settings: `filled`
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
}
