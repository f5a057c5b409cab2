"""Norms whose y is read by FP8 layers quantise it in their own pass: kernels/norm_fp8.py."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from fusekit.kernels.norm_fp8 import WITH_CODES, why_not
from fusekit.kernels.recipe import Recipe
from fusekit.passes.propagate import faking


class Made(NamedTuple):
    """The nodes of what a norm makes beside y: kernels/norm_fp8.py: Made."""

    codes: fx.Node
    inverse: fx.Node
    maxima: fx.Node


def quantise_in_norm(x: Any, reader: fx.Node, token: str, turned: bool) -> Made | None:
    """Have the norm that makes x, where one does, quantise it for this layer and those with its recipe.

    turned: a gradient will need the second layout.
    """
    norm = x.args[0] if isinstance(x, fx.Node) and x.target is operator.getitem and x.args[1] == 0 else None
    if not isinstance(norm, fx.Node) or norm.target not in WITH_CODES:
        return None
    if norm.meta.get("region") != reader.meta.get("region"):
        return None  # under another grad mode, or with a write in between
    if why_not(x.meta["val"], Recipe.parse(token)) is not None:
        return None
    schema = norm.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), norm.args, strict=False), **norm.kwargs)
    norm.args = (*(given.get(a.name, a.default_value) for a in schema), token, turned)
    norm.kwargs, norm.target = {}, WITH_CODES[norm.target]
    values = fx.map_arg(norm.args, lambda n: n.meta["val"])
    with faking(x), torch.no_grad():
        made = norm.target(*values)[2:]
    norm.meta["val"] = (*norm.meta["val"][:2], *made)
    nodes = []
    for i, value in enumerate(made):
        with norm.graph.inserting_after(norm):
            nodes.append(norm.graph.call_function(operator.getitem, (norm, 2 + i)))
        about = {k: v for k, v in norm.meta.items() if k in ("stack_trace", "nn_module_stack", "region")}
        nodes[-1].meta |= about | {"val": value}
    return Made(*nodes)
