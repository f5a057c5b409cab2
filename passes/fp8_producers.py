"""What makes a tensor that FP8 layers read helps to quantise it: kernels/norm_fp8.py and fp8_maxima.py."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from fusekit.kernels import FP8_OPS
from fusekit.kernels.fp8_maxima import fp8_maxima, helps, keeps_count
from fusekit.kernels.norm_fp8 import WITH_CODES, why_not
from fusekit.kernels.recipe import Recipe
from fusekit.passes.propagate import faking

LINEAR = FP8_OPS["linear_fp8"].fused
_ARGUMENTS = [argument.name for argument in LINEAR._schema.arguments]


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
    if source.target is LINEAR and recipe.output and helps(recipe) and source.args[3] != "none":
        return _layer(source, reader) if keeps_count(Recipe.parse(str(source.args[4]))) else None
    return None


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


def _layer(layer: fx.Node, reader: fx.Node) -> Made:
    """A layer with an activation: without one, a library may be the faster, and it counts nothing."""
    with layer.graph.inserting_before(layer):
        maxima = layer.graph.call_function(fp8_maxima, (*layer.args[:2], reader.args[4]))
    maxima.meta |= whereabouts(layer) | {"val": value_of(maxima)}
    set_argument(layer, "maxima", maxima)
    return Made(maxima)


def value_of(node: fx.Node) -> Any:
    """What the node returns, on fake tensors."""
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with faking(node.all_input_nodes[0]), torch.no_grad():
        return node.target(*values[0], **values[1])  # type: ignore[operator]


def whereabouts(node: fx.Node) -> dict[str, Any]:
    """What a node that is made on behalf of this one takes over."""
    return {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "region")}


def argument(layer: fx.Node, name: str) -> Any:
    """Of a linear_fp8 node."""
    position = _ARGUMENTS.index(name)
    return layer.args[position] if position < len(layer.args) else layer.kwargs.get(name)


def set_argument(layer: fx.Node, name: str, value: Any) -> None:
    position = _ARGUMENTS.index(name)
    missing = LINEAR._schema.arguments[len(layer.args) : position + 1]
    args = [*layer.args, *(argument.default_value for argument in missing)]
    args[position] = value
    layer.args = tuple(args)
