"""What makes a tensor that FP8 layers read helps to quantise it: kernels/norm_fp8.py and fp8_maxima.py."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from fusekit.kernels import FP8_OPS, OPS
from fusekit.kernels.fp8_maxima import fp8_maxima, helps, keeps_count
from fusekit.kernels.norm_fp8 import WITH_CODES, why_not
from fusekit.kernels.recipe import Recipe
from fusekit.passes.propagate import faking

LINEAR, GATE = FP8_OPS["linear_fp8"].fused, OPS["gated_act"].fused


class Made(NamedTuple):
    """Nodes: largest magnitudes of a tensor; of a norm's y codes and inverse scales too, which are absent at
    run time where the scaling has none."""

    maxima: fx.Node
    codes: fx.Node | None = None
    inverse: fx.Node | None = None


def help_quantise(reader: fx.Node, turned: bool) -> Made | None:
    """Have what makes this layer's x, where it can, quantise it for the layer and those with its recipe.

    turned: a gradient will need the second layout.
    """
    x, recipe = reader.args[0], Recipe.parse(str(reader.args[4]))
    by_item = isinstance(x, fx.Node) and x.target is operator.getitem and x.args[1] == 0
    source = x.args[0] if isinstance(x, fx.Node) and by_item else x
    if not isinstance(source, fx.Node) or source.meta.get("region") != reader.meta.get("region"):
        return None  # under another grad mode, or with a write in between
    if by_item and source.target in WITH_CODES:
        return _norm(source, reader, turned) if why_not(x.meta["val"], recipe) is None else None  # type: ignore[union-attr]
    if source.target not in (GATE, LINEAR) or not (recipe.output and helps(recipe)):
        return None
    if not isinstance(source.meta["val"].shape[-1], int):
        return None
    if source.target is GATE:
        return _counted(source, reader, by_product=False)
    # A layer with an activation: without one, a library may be the faster, and it counts nothing.
    counts = source.args[3] != "none" and keeps_count(Recipe.parse(str(source.args[4])))
    return _counted(source, reader) if counts else None


def _norm(norm: fx.Node, reader: fx.Node, turned: bool) -> Made:
    schema = norm.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), norm.args, strict=False), **norm.kwargs)
    norm.args = (*(given.get(a.name, a.default_value) for a in schema), reader.args[4], turned)
    norm.kwargs, norm.target = {}, WITH_CODES[norm.target]
    made = value_of(norm)[2:]
    norm.meta["val"] = (*norm.meta["val"][:2], *made)
    nodes = []
    for i, value in enumerate(made):
        with norm.graph.inserting_after(norm):
            nodes.append(norm.graph.call_function(operator.getitem, (norm, 2 + i)))
        nodes[-1].meta |= whereabouts(norm) | {"val": value}
    codes, inverse, maxima = nodes
    return Made(maxima, codes, inverse)


def _counted(source: fx.Node, reader: fx.Node, by_product: bool = True) -> Made:
    """What makes the tensor raises maxima of it, of the recipe that the reader quantises it by."""
    with source.graph.inserting_before(source):
        arguments = source.args[0], source.meta["val"].shape[-1], reader.args[4], by_product
        maxima = source.graph.call_function(fp8_maxima, arguments)
    maxima.meta |= whereabouts(source) | {"val": value_of(maxima)}
    set_argument(source, "maxima", maxima)
    return Made(maxima)


def value_of(node: fx.Node) -> Any:
    """What the node returns, on fake tensors."""
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with faking(node.all_input_nodes[0]), torch.no_grad():
        return node.target(*values[0], **values[1])  # type: ignore[operator]


def whereabouts(node: fx.Node) -> dict[str, Any]:
    """What a node that is made on behalf of this one takes over."""
    return {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "region")}


def argument(node: fx.Node, name: str) -> Any:
    """Of a fused op's node."""
    position = _position(node, name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    position = _position(node, name)
    missing = node.target._schema.arguments[len(node.args) : position + 1]  # type: ignore[union-attr]
    args = [*node.args, *(argument.default_value for argument in missing)]
    args[position] = value
    node.args = tuple(args)


def _position(node: fx.Node, name: str) -> int:
    return [argument.name for argument in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
