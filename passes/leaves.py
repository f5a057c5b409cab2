"""requires_grad_() of an intermediate where Inductor runs the graph: AOTAutograd would drop it.

What such calls need is computed first, eagerly; the graph behind takes their results as inputs, of which
AOTAutograd knows what needs a gradient. Adapters call it on a frozen embedding's output: little goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fusekit.passes.canonicalise import bodies, require_gradient
from fusekit.passes.normalise import is_mutation


def find_leaves(module: fx.GraphModule) -> list[fx.Node]:
    """The calls in the graph and in the bodies of its checkpoints."""
    return [
        node
        for body in bodies(module)
        for node in body.graph.find_nodes(op="call_function", target=require_gradient)
    ]


def split_leaves(module: fx.GraphModule) -> Callable[..., Any] | None:
    """Take the calls out of a graph, whose last inputs become their results.

    Returns a function of the inputs as they were that makes the results; None, and the graph untouched, where
    what comes before a call may not be run ahead of the rest.
    """
    leaves = find_leaves(module)
    before = _ancestors(leaves)
    if any(leaf.graph is not module.graph for leaf in leaves) or not all(map(_may_run_first, before)):
        return None
    first = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in before:
            values[node] = first.node_copy(node, values.__getitem__)
    first.output(tuple(values[leaf] for leaf in leaves))
    prefix = fx.GraphModule(module, first)
    for leaf in leaves:
        with module.graph.inserting_after(module.graph.find_nodes(op="placeholder")[-1]):
            given = module.graph.placeholder(f"{leaf.name}_given")
        given.meta = {"val": leaf.meta["val"], "requires_grad": True}
        leaf.replace_all_uses_with(given)
    for node in sorted(before, reverse=True):
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return prefix.forward


def _ancestors(leaves: list[fx.Node]) -> set[fx.Node]:
    """The calls and what they are made of, without the graph's inputs."""
    found: set[fx.Node] = set()
    pending = list(leaves)
    while pending:
        node = pending.pop()
        if node not in found and node.op != "placeholder":
            found.add(node)
            pending += node.all_input_nodes
    return found


def _may_run_first(node: fx.Node) -> bool:
    """Neither random nor a write, nor what nobody looks into: order is not theirs to change."""
    if node.op == "get_attr" or node.target is require_gradient:
        return True
    known = isinstance(node.target, torch._ops.OpOverload)
    return known and not is_mutation(node) and torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]
