"""One spelling per meaning, where that changes nothing: the pass every pattern and every graph goes through.

    view -> reshape            a fused op may return other strides than what it replaced
    x.relu_() -> relu(x)       where x is a temporary nobody else sees
    drop no-ops                casts to the same dtype, dropout(p=0), contiguous of contiguous, times 1
    dims counted from the end  so one pattern fits every rank
    cat([empty, k]) -> k       the first step of a Hugging Face cache

and a region number on every node: grad-mode switches, autocast switches and mutations separate regions, and
no fusion may span two. What is judged is meta["val"], never a literal argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusekit.passes import _compat
from fusekit.passes.canonicalise import bodies
from fusekit.passes.region import Region
from fusekit.passes.spelling import filled, value_of

aten = torch.ops.aten

_MODE_SWITCHES = (_compat.set_grad_enabled, _compat.enter_autocast, _compat.exit_autocast)
_DIMS_OF_INPUT = {
    aten.transpose.int, aten.softmax.int, aten.log_softmax.int, aten.mean.dim, aten.sum.dim_IntList,
    aten.permute.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.chunk.default,
    aten.squeeze.dim, aten.unbind.int, aten.repeat_interleave.self_int, aten.cumsum.default,
}  # fmt: skip
_DIMS_OF_OUTPUT = {aten.unsqueeze.default, aten.cat.default, aten.stack.default}
_DROPPED_WHEN_EQUAL = {"to", "type_as", "contiguous", "alias", "reshape", "expand", "expand_as", "dropout"}


def normalise(region: Region) -> None:
    """Bring the captured graph, and the bodies of its activation checkpoints, into one spelling."""
    for module in bodies(region.module):
        normalise_graph(module)


def normalise_graph(module: fx.GraphModule) -> None:
    """Normalise one graph in place; meta["val"] must be there, meta["region"] is added."""
    graph = module.graph
    for node in list(graph.nodes):
        _functional_if_private(node)
    written = writes(graph)
    for node in list(graph.nodes):
        node.meta["written"] = memory(value_of(node)) in written
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        _count_dims_from_the_end(node)
        same = _same_as(node)
        if same is not None:
            _forward_uses(node, same)
    _number_regions(graph)
    graph.lint()
    module.recompile()


def schema_of(node: fx.Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def is_view(node: fx.Node) -> bool:
    """Whether a result may share memory with an argument that it does not write."""
    schema = schema_of(node)
    if schema is None:
        return True
    aliasing = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return aliasing or node.target in _MAY_ALIAS


_MAY_ALIAS = {
    aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
    aten.to.other, aten.type_as.default, aten.dropout.default, aten.flatten.using_ints,
    aten.reshape_as.default, aten.expand_as.default,
    aten.mT.default, aten.numpy_T.default, aten.unflatten.int, aten.chunk.default, aten.matrix_H.default,
    aten.adjoint.default, aten.narrow.default, aten.movedim.int, aten.swapaxes.default,
}  # fmt: skip


def is_mutation(node: fx.Node) -> bool:
    """Whether a call writes to one of its arguments; an optional one that is not given is not written."""
    schema = schema_of(node)
    if schema is None or not schema.is_mutable:
        return False
    pairs = zip(schema.arguments, filled(node), strict=True)
    return any(a.alias_info is not None and a.alias_info.is_write and given is not None for a, given in pairs)


def _functional_if_private(node: fx.Node) -> None:
    """Rewrite `x.f_()` as `f(x)` where x is a fresh temporary that nothing else reads from now on."""
    if not is_mutation(node) or not node.args or not isinstance(node.args[0], fx.Node):
        return
    schema, target = schema_of(node), node.args[0]
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    random = torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
    if written != [schema.arguments[0].name] or random or not _is_private(target, node):
        return
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    functional = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]
    if functional is None or functional._schema.is_mutable:
        return
    try:
        result = functional(*map(_vals, node.args), **{k: _vals(v) for k, v in node.kwargs.items()})
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # the in-place form takes arguments the functional one does not
        return
    if isinstance(result, Tensor) and same_meta(result, value_of(node)):
        node.target = functional


def _vals(argument: Any) -> Any:
    return fx.node.map_arg(argument, value_of)


def _is_private(target: fx.Node, mutation: fx.Node) -> bool:
    """A call that returns fresh memory made the tensor; only earlier nodes read it, none by a view."""
    if target.op != "call_function" or is_view(target):
        return False
    if is_mutation(target) or _keeps_alias(target):
        return False
    return all(user is mutation or (user < mutation and not is_view(user)) for user in target.users)


def _keeps_alias(node: fx.Node) -> bool:
    return schema_of(node) is None  # a getitem or a Python function may hand out somebody else's memory


def same_meta(a: Any, b: Any) -> bool:
    """Equal dtype, device and (provably) shape."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.dtype == b.dtype and a.device == b.device and same_shape(a.shape, b.shape)


def same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def memory(value: Any) -> int | None:
    """What names the memory behind a fake tensor; views of one tensor share it. None for anything else."""
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def writes(graph: fx.Graph) -> dict[int | None, list[fx.Node]]:
    """The nodes that write in place, by the memory they write to."""
    found: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        if not is_mutation(node):
            continue
        for position, argument in enumerate(schema_of(node).arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                for target in _nodes_in(given):
                    found.setdefault(memory(value_of(target)), []).append(node)
    return found


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


def _count_dims_from_the_end(node: fx.Node) -> None:
    if node.target in _DIMS_OF_INPUT:
        tensor = value_of(node.args[0]) if node.args else None
    elif node.target in _DIMS_OF_OUTPUT:
        tensor = value_of(node)
    else:
        return
    if not isinstance(tensor, Tensor) or tensor.dim() == 0:
        return
    rank = tensor.dim()

    def negative(dim: Any) -> Any:
        return dim - rank if isinstance(dim, int) and dim >= 0 else dim

    args, kwargs = list(node.args), dict(node.kwargs)
    for position, argument in enumerate(schema_of(node).arguments):
        if argument.name not in ("dim", "dim0", "dim1", "dims"):
            continue
        place: Any = args if position < len(args) else kwargs
        key: Any = position if position < len(args) else argument.name
        if position < len(args) or argument.name in kwargs:
            value = place[key]
            place[key] = [negative(d) for d in value] if isinstance(value, (list, tuple)) else negative(value)
    node.args, node.kwargs = tuple(args), kwargs


def _same_as(node: fx.Node) -> fx.Node | None:
    """The node whose value this one repeats, or None."""
    schema = schema_of(node)
    if schema is None or schema.is_mutable or not node.args:
        return None
    name = schema.name.removeprefix("aten::")
    if name == "cat":
        return _cat_of_one(node)
    source = node.args[0]
    if not isinstance(source, fx.Node) or not same_meta(value_of(source), value_of(node)):
        return None
    if name in _DROPPED_WHEN_EQUAL:
        kept = name == "dropout" and len(node.args) == 3 and node.args[1] != 0 and bool(node.args[2])
        kept |= name == "contiguous" and not value_of(source).is_contiguous()
        kept |= name == "to" and _asks_copy(node)
        kept |= name == "to" and value_of(source).stride() != value_of(node).stride()
        return None if kept else source
    if name in ("mul", "add", "div", "sub") and isinstance(node.args[1], (int, float)):
        neutral = 1 if name in ("mul", "div") else 0
        plain = len(node.args) == 2 and not node.kwargs and not isinstance(node.args[1], bool)
        if plain and node.args[1] == neutral and not _needs_own_memory(node, source):
            return source
    return None


def _needs_own_memory(node: fx.Node, source: fx.Node) -> bool:
    """Whether a copy of `source` would be missed: one of the two is written to, or the copy is handed out."""
    return bool(node.meta["written"] or source.meta["written"] or _is_handed_out(node))


def _is_handed_out(node: fx.Node) -> bool:
    return any(user.op == "output" or (is_view(user) and _is_handed_out(user)) for user in node.users)


def _asks_copy(node: fx.Node) -> bool:
    names = [a.name for a in schema_of(node).arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return bool(given.get("copy")) or given.get("memory_format") not in (None, torch.preserve_format)


def _cat_of_one(node: fx.Node) -> fx.Node | None:
    tensors: Any = node.args[0]
    if not isinstance(tensors, (list, tuple)):
        return None
    filled = [t for t in tensors if not _is_empty(value_of(t))]
    if len(filled) != 1 or len(tensors) == 1 or not same_meta(value_of(filled[0]), value_of(node)):
        return None
    return None if _needs_own_memory(node, filled[0]) else filled[0]


def _is_empty(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and any(isinstance(s, int) and s == 0 for s in tensor.shape)


def _forward_uses(node: fx.Node, source: fx.Node) -> None:
    """Let readers of `node` read `source`; a graph output or a writer keeps the node it shows."""
    node.replace_all_uses_with(
        source, delete_user_cb=lambda user: user.op != "output" and not is_mutation(user)
    )
    if not node.users:
        node.graph.erase_node(node)


def _number_regions(graph: fx.Graph) -> None:
    number = 0
    for node in graph.nodes:
        barrier = node.target in _MODE_SWITCHES or is_mutation(node)
        number += barrier
        node.meta["region"] = number
        number += barrier
